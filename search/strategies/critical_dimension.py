"""LongRoPE2's structure with its critical index searched: one optimiser per index, halved on the same documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from longrope_export.rope.frequencies import crossing, wavelengths
from longrope_export.search.evaluator import mean_by_candidate
from longrope_export.search.protocol import SEARCH, Outcome, Strategy, Trial
from longrope_export.search.space import Candidate, RopeNumbers

# The indices tried unless others are given; more of them leave fewer steps to each.
_INDICES = 4
# Pairs that turn this often within the window have seen enough of every angle (LongRoPE2, arXiv 2502.20082, §3.2).
_TURNS = 10.0


class Recorded(Strategy, Protocol):
    """A strategy that keeps the course of its losses, and remarks for the user."""

    @property
    def history(self) -> list[float]:
        """The best loss after each generation, or the loss at each step."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of its course."""
        ...


class CriticalIndexSearch:
    """Runs one strategy per critical index, a share of the way each, and keeps the better half, until one is left.

    `arms` maps an index to its strategy. In each rung every arm is served `rounds` times; then the first finalist of
    each is measured on the first `documents` search documents, the same for all. The last arm runs to its end.

    This is successive halving (arXiv 1502.07943), not the racing of a generation: an arm is unfinished, so a gap between
    two of them says how far each has come, not which index is better in the end, and no test of that gap would be
    evidence for dropping one. A fixed schedule always ends, and what the last arm gets is known when the budget is
    divided; where two arms cannot be told apart, dropping either costs little.
    """

    def __init__(self, arms: Mapping[int, Recorded], rounds: int, documents: int, part: str = SEARCH) -> None:
        self._arms = dict(arms)
        self._rounds, self._documents, self._part = max(1, rounds), documents, part
        self._served = 0
        self._sizes: list[int] = []
        self._comparing: list[Candidate] = []
        self._all = dict(arms)
        self.losses: dict[int, float] = {}

    @property
    def indices(self) -> tuple[int, ...]:
        """The critical indices still in the race, the best first once they were compared."""
        return tuple(self._arms)

    @property
    def history(self) -> list[float]:
        """The course of the best arm."""
        return self._first().history

    @property
    def notes(self) -> list[str]:
        """Those of every arm, by its index."""
        return [f"critical index {index}: {note}" for index, arm in self._all.items() for note in arm.notes]

    def ask(self) -> list[Trial]:
        """A step of every arm, or the comparison at the end of a rung."""
        if len(self._arms) > 1 and self._served >= self._rounds:
            return self._compare()
        asked = [arm.ask() for arm in self._arms.values()]
        if len(self._arms) > 1 and not any(asked):
            return self._compare()
        self._sizes = [len(trials) for trials in asked]
        return [trial for trials in asked for trial in trials]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Hand every arm its outcomes, or keep the better half."""
        if self._comparing:
            self._halve(mean_by_candidate(outcomes, self._documents))
            return
        start = 0
        for arm, size in zip(self._arms.values(), self._sizes):
            if size:
                arm.tell(outcomes[start : start + size])
            start += size
        self._served += 1

    def finalists(self) -> list[Candidate]:
        """Those of the arm that is left, or of the best so far."""
        return self._first().finalists()

    def _first(self) -> Recorded:
        return next(iter(self._arms.values()))

    def _compare(self) -> list[Trial]:
        self._comparing = [arm.finalists()[0] for arm in self._arms.values()]
        return [Trial(each, self._part, index) for each in self._comparing for index in range(self._documents)]

    def _halve(self, losses: Sequence[float]) -> None:
        self.losses |= dict(zip(self._arms, losses))
        best = sorted(range(len(losses)), key=losses.__getitem__)[: math.ceil(len(losses) / 2)]
        names = list(self._arms)
        self._arms = {names[place]: self._arms[names[place]] for place in best}
        self._comparing, self._served = [], 0


def rung_sizes(arms: int) -> list[int]:
    """Arms alive in each rung: halved until one is left."""
    sizes = [arms]
    while sizes[-1] > 1:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes


def critical_indices(numbers: RopeNumbers, every: bool = False) -> tuple[int, ...]:
    """The indices to try: from the pair that turns ten times within L to the one that turns once, `every` or a few evenly.

    LongRoPE2's real critical index lies below the theoretical one; see its algorithm 1.
    """
    periods = wavelengths(numbers.rope_theta, numbers.rotary_dim, numbers.base_factors)
    ends = [math.ceil(crossing(periods, numbers.window, turns)) for turns in (_TURNS, 1.0)]
    low, high = (min(max(end, 0), numbers.pairs - 1) for end in ends)
    count = max(high - low, 0) + 1 if every else _INDICES
    return tuple(sorted({round(place) for place in np.linspace(low, high, count)}))
