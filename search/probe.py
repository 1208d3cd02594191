"""Measures how long a forward pass and a gradient take, at a fraction of the long length where that one is slow."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

from longrope_export.search.plan import Timing
from longrope_export.search.protocol import SEARCH, TimedObjective
from longrope_export.search.space import RopeNumbers

# A pass longer than this is not run for the probe but extrapolated from shorter ones.
_DIRECT_SECONDS = 3.0
# The first pass allocates: it has this many tokens, and does not count.
_WARM_UP = 64

Pace = Callable[[int], float]


def probe(objective: TimedObjective, numbers: RopeNumbers, gradient: bool, early: int | None = None) -> Timing:
    """Seconds of each kind of pass; the gradients' are the forwards' when `gradient` is False; `early` is in tokens."""
    candidate = numbers.unchanged()

    def pace(with_gradient: bool) -> Pace:
        @functools.cache
        def seconds(length: int) -> float:
            return _timed(lambda: objective.measure_prefix(candidate, SEARCH, length, gradient=with_gradient))

        return _extrapolated(seconds, numbers.target)

    objective.measure_prefix(candidate, SEARCH, min(_WARM_UP, numbers.window), gradient=gradient)
    forward = pace(False)
    backward = pace(True) if gradient else forward
    target, short = numbers.target, numbers.short_window
    early_gradient = backward(early) if early and gradient else 0.0
    return Timing(forward(target), backward(target), forward(short), backward(short), early_gradient)


def _timed(call: Callable[[], None]) -> float:
    started = time.perf_counter()
    call()
    return max(time.perf_counter() - started, 1e-6)


def _extrapolated(measure: Pace, target: int) -> Pace:
    """Seconds by length up to `target`: measured where `target` is quick, else a·n + b·n² through two shorter lengths."""
    quarter, eighth = max(2, target // 4), max(2, target // 8)
    at_eighth, at_quarter = measure(eighth), measure(quarter)
    if 16.0 * at_quarter <= _DIRECT_SECONDS:
        return measure
    quadratic = max(0.0, (at_quarter - 2.0 * at_eighth) / (quarter**2 - 2.0 * eighth**2))
    linear = max(0.0, (at_quarter - quadratic * quarter**2) / quarter)
    return lambda length: linear * length + quadratic * length**2
