"""Small helpers for benchmarks: alternating timings, and the peak memory of a child process."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


def alternating_seconds(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of every run, each called once a round, so that drifting load meets all of them alike.

    Each round begins with another run: none always follows the same one. `clock=time.process_time` counts this
    process's processor time: for one thread on a machine that others use too.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(rounds):
        first = index % len(names)
        for name in [*names[first:], *names[:first]]:
            gc.collect()
            started = clock()
            runs[name]()
            seconds[name].append(clock() - started)
    return seconds


def best_ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    """Best time of `name` over the best time of `base`: other load only ever adds to a time."""
    return min(seconds[name]) / min(seconds[base])


def ratio_spread(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> tuple[float, float, float]:
    """Lowest, median and highest ratio of the two times of one round."""
    ratios = [ours / other for ours, other in zip(seconds[name], seconds[base])]
    return min(ratios), statistics.median(ratios), max(ratios)


@dataclass(frozen=True)
class Child:
    """What a child process printed and took: seconds, processor seconds, and peak resident bytes (0: not told)."""

    output: str
    seconds: float
    processor: float
    peak: int


def run_measured(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Child:
    """Run `command` to its end; raises `SystemExit` when it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})})
    assert process.stdout is not None
    output = process.stdout.read()
    if not hasattr(os, "wait4"):
        code, peak, processor = process.wait(), 0, 0.0
    else:
        _, status, usage = os.wait4(process.pid, 0)
        code = process.returncode = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        processor = usage.ru_utime + usage.ru_stime
    if code:
        raise SystemExit(f"{' '.join(command)} ended with code {code}")
    return Child(output, time.perf_counter() - started, processor, peak)


def run_child(command: Sequence[str], *, environment: Mapping[str, str] | None = None) -> tuple[str, float, int]:
    """Run `command`; its stdout, seconds, and peak resident memory in bytes (0 where the system does not tell)."""
    child = run_measured(command, environment=environment)
    return child.output, child.seconds, child.peak


_DRAWS = 10_000


def bootstrap_interval(differences: Sequence[float] | npt.NDArray[np.floating[Any]]) -> tuple[float, float]:
    """95 % interval of the mean of `differences`, resampled with replacement; the same one each time."""
    values = np.asarray(differences, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(values), size=(_DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def machine() -> str:
    """Processor and software in one line, for the head of a report."""
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
