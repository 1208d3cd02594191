"""The probe's child process: loads the model and times forwards of doubling length, one JSON line for each.

Run by `longrope_export.probe` as `python -m longrope_export.probe_worker REQUEST`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from longrope_export.errors import LongRopeError
from longrope_export.planning import LOGITS_CHUNK, Measurement
from longrope_export.probe import ProbeRequest

_ENOUGH_SECONDS = 0.2  # shorter forwards are repeated and the fastest counts
_REPEATS = 3


def main(text: str) -> int:
    """Measure what the JSON request asks for; a user's error becomes a line with "error" and exit code 1."""
    request = ProbeRequest(**json.loads(text))
    try:
        _measure(request)
    except LongRopeError as error:
        _say({"error": str(error)})
        return 1
    return 0


def _measure(request: ProbeRequest) -> None:
    from longrope_export.checkpoint import open_checkpoint

    open_checkpoint(request.path)  # says what is wrong before the heavy imports
    import torch

    from longrope_export.loader import load

    if request.threads:
        torch.set_num_threads(request.threads)
    _say({"threads": torch.get_num_threads()})
    model = load(request.path, dtype=getattr(torch, request.dtype))
    _forward(model, request, request.first)
    _attention(model, request)
    until = time.perf_counter() + request.seconds
    longest = _doubling(model, request, until)
    # Other programs only ever slow a forward down: time that is left goes into trying the longest ones again.
    while longest and (lasted := _cheapest_left(longest, until)):
        _say(vars(_one(model, request, lasted)))
        longest = [entry for entry in longest if entry.length != lasted]


def _doubling(model: Any, request: ProbeRequest, until: float) -> list[Measurement]:
    measurements: list[Measurement] = []
    length = min(request.first, request.target)
    while True:
        measurements.append(_one(model, request, length))
        _say(vars(measurements[-1]))
        following = min(2 * length, request.target)
        # A doubled length takes up to four times as long.
        if following == length or time.perf_counter() + 4.0 * measurements[-1].seconds > until:
            return measurements[-3:]
        length = following


def _attention(model: Any, request: ProbeRequest) -> None:
    """Time one layer's attention at doubling lengths; nothing is said where the model uses another kernel."""
    if model.config.get_text_config()._attn_implementation != "sdpa":
        return
    length = min(256, request.target)
    seconds, cpu = _attention_seconds(request, length)
    while length < request.target and seconds < _ENOUGH_SECONDS:
        length = min(2 * length, request.target)
        seconds, cpu = min(_attention_seconds(request, length) for _ in range(_REPEATS))
    _say({"attention": {"length": length, "seconds": seconds, "cpu_seconds": cpu}})


def _attention_seconds(request: ProbeRequest, length: int) -> tuple[float, float]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    shape = (1, request.heads, length, request.head_dim)
    query = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, request.dtype))
    with torch.no_grad(), _Stopwatch() as watch:
        scaled_dot_product_attention(query, query, query, is_causal=True)
    return watch.seconds


def _cheapest_left(measurements: list[Measurement], until: float) -> int | None:
    left = until - time.perf_counter()
    return next((entry.length for entry in reversed(measurements) if entry.seconds < left), None)


def _one(model: Any, request: ProbeRequest, length: int) -> Measurement:
    separate = _reset_peak()
    seconds, cpu = _forward(model, request, length)
    for _ in range(_REPEATS - 1):
        if seconds < _ENOUGH_SECONDS:
            again = _forward(model, request, length)
            seconds, cpu = min(seconds, again[0]), min(cpu, again[1])
    return Measurement(length, seconds, cpu, _peak() if separate else None)


def _forward(model: Any, request: ProbeRequest, length: int) -> tuple[float, float]:
    """Seconds on the clock and of processor time of all threads."""
    import torch

    from longrope_export.evaluation.losses import token_losses

    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, request.vocab, (1, max(length, 2)), generator=generator)
    with torch.no_grad(), _Stopwatch() as watch:
        token_losses(model, ids, chunk=LOGITS_CHUNK)
    return watch.seconds


class _Stopwatch:
    """`seconds`: time on the clock and processor time of all threads, of the body."""

    seconds: tuple[float, float]

    def __enter__(self) -> _Stopwatch:
        self._start = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def _reset_peak() -> bool:
    """Forget the peak so far (loading needs more than running); False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _peak() is not None


def _peak() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def _say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
