"""Floats below 1.2e-38 computed as zero: attention's backward pass is full of them, and CPUs take many times longer for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """While active, torch computes denormal floats as zero in this thread, and in its CPU threads that begin meanwhile.

    The probabilities of far tokens underflow in a softmax. With this a gradient of the demo model at 8,192 tokens takes
    0.45 of the time, and is the same to the bit (`benchmarks/denormals.py`). torch's threads begin with the first
    parallel work, so enter it before any: a thread without the mode holds the others up. Where the processor has no such
    mode nothing is changed.
    """
    import torch

    before = _flushes()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def _flushes() -> bool:
    import torch

    return float(torch.tensor([2e-38]).mul(0.25).view(torch.int32)[0]) == 0
