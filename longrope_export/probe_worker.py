"""The probe's child process: loads the model, times forwards of doubling length, prints one JSON line for each.

Run by `longrope_export.probe` as `python -m longrope_export.probe_worker REQUEST`.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from longrope_export.errors import LongRopeError
from longrope_export.planning import Measurement, predict
from longrope_export.probe import ProbeRequest

_ENOUGH_SECONDS = 0.2  # shorter forwards are repeated and the fastest counts
_REPEATS = 3


def main(text: str) -> int:
    """Measure what the JSON request asks for; a user's error becomes a line with the key "error" and exit code 1."""
    request = ProbeRequest(**json.loads(text))
    try:
        _measure(request)
    except LongRopeError as error:
        _say({"error": str(error)})
        return 1
    return 0


def _measure(request: ProbeRequest) -> None:
    import torch

    from longrope_export.loader import load

    if request.threads:
        torch.set_num_threads(request.threads)
    _say({"threads": torch.get_num_threads()})
    model = load(request.path, dtype=getattr(torch, request.dtype))
    started, points = time.perf_counter(), []
    _forward(model, request, request.first)
    length = min(request.first, request.target)
    while True:
        measured = _one(model, request, length)
        points.append((length, measured.seconds))
        _say(vars(measured))
        if length >= request.target:
            return
        length = min(2 * length, request.target)
        left = request.seconds - (time.perf_counter() - started)
        # A doubled length takes up to four times as long; until there is a fit, assume that it does.
        expected = predict(length, points, degree=2) if len(points) > 3 else 4.0 * measured.seconds
        if expected > left:
            return


def _one(model: Any, request: ProbeRequest, length: int) -> Measurement:
    separate = _reset_peak()
    seconds = _forward(model, request, length)
    for _ in range(_REPEATS - 1):
        if seconds < _ENOUGH_SECONDS:
            seconds = min(seconds, _forward(model, request, length))
    return Measurement(length, seconds, _peak() if separate else None)


def _forward(model: Any, request: ProbeRequest, length: int) -> float:
    import torch

    from longrope_export.evaluation.losses import token_losses

    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, request.vocab, (1, max(length, 2)), generator=generator)
    started = time.perf_counter()
    with torch.no_grad():
        token_losses(model, ids)
    return time.perf_counter() - started


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
