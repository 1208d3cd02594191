"""The measured probe: forwards of growing length in a child process, which may run out of memory."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import IO, Any

from longrope_export.description import ModelDescription
from longrope_export.planning import Attention, Estimate, Measurement, available_memory, estimate_at

Progress = Callable[[Measurement], None]

BYTES = {"bfloat16": 2, "float32": 4}
_OVERHEAD = 1 << 30  # interpreter, torch and transformers take about half of this


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """What the child measures: lengths are doubled from `first` to `target` while `seconds` allow."""

    path: str
    target: int
    vocab: int
    heads: int
    head_dim: int
    dtype: str = "bfloat16"
    threads: int | None = None
    seconds: float = 20.0
    first: int = 32


def run_probe(
    description: ModelDescription,
    target: int,
    *,
    dtype: str = "bfloat16",
    threads: int | None = None,
    seconds: float = 20.0,
    progress: Progress | None = None,
) -> tuple[Estimate | None, tuple[str, ...]]:
    """Measure forward passes on the real model and extrapolate to `target` tokens.

    Returns the estimate (None when nothing was measured) and one line for each thing that was not measured.
    """
    if reason := _why_not(description, dtype):
        return None, (f"time and memory of an evaluation: {reason}",)
    request = ProbeRequest(
        path=description.path,
        target=target,
        vocab=description.vocab,
        heads=description.heads,
        head_dim=description.head_dim,
        dtype=dtype,
        threads=threads,
        seconds=seconds,
    )
    measurements, attention, used, problem = _collect(request, progress)
    missing = [f"longer lengths: {problem}"] if problem and measurements else []
    if not measurements:
        return None, (f"time and memory of an evaluation: {problem or 'the probe gave no result'}",)
    estimate = estimate_at(
        target, measurements, dtype=dtype, threads=used, layers=description.layers, attention=attention
    )
    if attention is None:
        missing.append("attention by itself: the time at long lengths is a guess from short ones")
    if estimate.peak_bytes is None:
        missing.append("peak memory of an evaluation: this system does not report it")
    return estimate, tuple(missing)


def _why_not(description: ModelDescription, dtype: str) -> str | None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed; pip install 'longrope-export[model]'"
    # A GGUF file is dequantised through float32 before it is cast.
    size = max(BYTES[dtype], 4 if description.kind == "gguf" else 0)
    needed, available = description.parameters * size + _OVERHEAD, available_memory()
    if available is not None and needed > available:
        return f"loading takes about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB are free"
    return None


def _collect(
    request: ProbeRequest, progress: Progress | None
) -> tuple[list[Measurement], Attention | None, int, str | None]:
    command = [sys.executable, "-m", "longrope_export.probe_worker", json.dumps(asdict(request))]
    measurements: list[Measurement] = []
    attention, threads, problem = None, 0, None
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            assert child.stdout is not None
            for message in _messages(child.stdout):
                problem = message.get("error", problem)
                threads = message.get("threads", threads)
                if "attention" in message:
                    attention = Attention(**message["attention"])
                if "length" in message:
                    measurements.append(Measurement(**message))
                    if progress is not None:
                        progress(measurements[-1])
        if child.returncode != 0 and problem is None:
            problem = _crash(child.returncode, errors)
    return measurements, attention, threads, problem


def _messages(stream: IO[str]) -> Iterator[dict[str, Any]]:
    for line in stream:
        if line.startswith("{"):
            yield json.loads(line)


def _crash(code: int, errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    if code < 0:
        return f"the probe was killed by signal {-code} (out of memory?)"
    return f"the probe failed: {lines[-1][:200] if lines else f'exit code {code}'}"
