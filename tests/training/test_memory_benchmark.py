"""What the memory benchmark makes of its children: peaks, a limit that stops, ratios that do not flatter."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system has no /proc")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    import finetune_memory

    return finetune_memory


def holding(megabytes: int, seconds: float) -> list[str]:
    script = f"import time; held = b'x' * ({megabytes} << 20); time.sleep({seconds}); print(len(held) >> 20)"
    return [sys.executable, "-c", script]


def test_a_child_within_the_limit_ends_by_itself_and_its_peak_is_known(benchmark: Any) -> None:
    output, code, peak = benchmark.watched(holding(100, 0.1), 1 << 30)
    assert (output.strip(), code) == ("100", 0)
    assert 100 << 20 < peak < 200 << 20


def test_a_child_over_the_limit_is_stopped(benchmark: Any) -> None:
    output, code, peak = benchmark.watched(holding(100, 60), 64 << 20)
    assert (output, code) == ("", -9)
    assert peak > 64 << 20


def test_a_side_that_did_not_fit_gives_a_bound_or_no_ratio(benchmark: Any) -> None:
    ours, theirs = benchmark.Step(3 << 30, seconds=1.0), benchmark.Step(12 << 30, seconds=2.0)
    stopped = benchmark.Step(12 << 30)
    assert benchmark.ratio_of(ours, theirs) == (0.25, False)
    assert benchmark.ratio_of(ours, stopped) == (0.25, True)
    assert benchmark.ratio_of(stopped, theirs) == (math.inf, False)
    assert benchmark.describe(stopped, 12.0) == "out of memory (over 12 GB)"
