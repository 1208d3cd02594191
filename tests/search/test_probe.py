"""What a probe measures, and how it stretches that to lengths that are too dear to try."""

from __future__ import annotations

from dataclasses import astuple

import pytest

from longrope_export.search import probe as module
from longrope_export.search.probe import probe
from longrope_export.search.protocol import Outcome, Trial
from longrope_export.search.space import Candidate, RopeNumbers

NUMBERS = RopeNumbers(rope_theta=10000.0, rotary_dim=32, window=1024, target=8192)


class Clocked:
    """A pass of n tokens takes `linear`·n + `quadratic`·n² seconds, a gradient three times that, of a clock that it moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, linear: float, quadratic: float) -> None:
        self.passes: list[tuple[int, bool]] = []
        self._costs, self._now = (linear, quadratic), 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self._now)

    def measure(self, trial: Trial) -> Outcome:
        raise AssertionError("a probe measures no trial")

    def measure_prefix(self, candidate: Candidate, part: str, length: int, *, gradient: bool) -> None:
        assert (candidate, part) == (NUMBERS.unchanged(), "search")
        self.passes.append((length, gradient))
        self._now += self.seconds(length) * (3.0 if gradient else 1.0)

    def seconds(self, length: int) -> float:
        linear, quadratic = self._costs
        return linear * length + quadratic * length**2


@pytest.mark.parametrize("gradient", [True, False])
def test_slow_passes_are_stretched_from_two_short_ones(monkeypatch: pytest.MonkeyPatch, gradient: bool) -> None:
    clocked = Clocked(monkeypatch, 1e-3, 2e-7)
    timing = probe(clocked, NUMBERS, gradient, 4096 if gradient else None)
    long, short, early = map(clocked.seconds, (8192, 1024, 4096))
    times = 3.0 if gradient else 1.0
    assert astuple(timing) == pytest.approx(
        (long, times * long, short, times * short, 3.0 * early if gradient else 0.0)
    )
    assert clocked.passes == [
        (64, gradient),
        *[(each, kind) for kind in (False, gradient)[: 1 + gradient] for each in (1024, 2048)],
    ]


def test_quick_passes_are_measured_whole_and_no_length_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clocked = Clocked(monkeypatch, 1e-5, 1e-9)
    timing = probe(clocked, NUMBERS, True)
    assert timing.forward == pytest.approx(clocked.seconds(8192))
    assert timing.short_gradient == pytest.approx(3.0 * clocked.seconds(1024))
    assert sorted(clocked.passes[1:]) == [(length, kind) for length in (1024, 2048, 8192) for kind in (False, True)]
