"""Measures how long a forward pass and a gradient take, at a fraction of the long length where that one is slow."""

from __future__ import annotations

import time
from collections.abc import Callable

from longrope_export.search.plan import Timing
from longrope_export.search.protocol import SEARCH, SHORT_SEARCH, TimedObjective
from longrope_export.search.space import RopeNumbers

# A pass longer than this is not run for the probe but extrapolated from shorter ones.
_DIRECT_SECONDS = 3.0


def probe(objective: TimedObjective, numbers: RopeNumbers, gradient: bool, early: int | None = None) -> Timing:
    """Seconds of each kind of pass; the gradients' are the forwards' when `gradient` is False; `early` is in tokens."""
    candidate = numbers.unchanged()

    def seconds(part: str, length: int, with_gradient: bool) -> float:
        return _timed(lambda: objective.measure_prefix(candidate, part, length, gradient=with_gradient))

    seconds(SHORT_SEARCH, numbers.short_window, False)  # the first pass allocates
    short = seconds(SHORT_SEARCH, numbers.short_window, False)
    long = _extrapolated(lambda length: seconds(SEARCH, length, False), numbers.target)
    if not gradient:
        return Timing(long, long, short, short)
    short_gradient = seconds(SHORT_SEARCH, numbers.short_window, True)
    long_gradient, early_gradient = (
        _extrapolated(lambda length: seconds(SEARCH, length, True), target) if target else 0.0
        for target in (numbers.target, early)
    )
    return Timing(long, long_gradient, short, short_gradient, early_gradient)


def _timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return max(time.perf_counter() - started, 1e-6)


def _extrapolated(measure: Callable[[int], float], target: int) -> float:
    """Seconds at `target` tokens: measured there if that is quick, else from a·n + b·n² through two shorter lengths."""
    quarter, eighth = max(2, target // 4), max(2, target // 8)
    at_eighth, at_quarter = measure(eighth), measure(quarter)
    if 16.0 * at_quarter <= _DIRECT_SECONDS:
        return measure(target)
    quadratic = max(0.0, (at_quarter - 2.0 * at_eighth) / (quarter**2 - 2.0 * eighth**2))
    linear = max(0.0, (at_quarter - quadratic * quarter**2) / quarter)
    return linear * target + quadratic * target**2
