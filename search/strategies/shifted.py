"""A strategy whose λ are relative to other factors than the model's present ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from longrope_export.search.protocol import Outcome, Trial
from longrope_export.search.space import Candidate
from longrope_export.search.strategies.critical_dimension import Recorded


class Shifted:
    """`inner` proposes λ relative to a set that is `unit` [pairs] times the model's present one.

    So bounds and orders hold where they are meant: a short set of a model that was extended before lies below its long
    factors. The gradient in log λ is the same for both.
    """

    def __init__(self, inner: Recorded, unit: Sequence[float]) -> None:
        self._inner, self._unit = inner, unit

    def ask(self) -> list[Trial]:
        """The inner strategy's trials, for the model as it is."""
        return [replace(trial, candidate=self._shift(trial.candidate)) for trial in self._inner.ask()]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Pass them on."""
        self._inner.tell(outcomes)

    def finalists(self) -> list[Candidate]:
        """The inner strategy's, for the model as it is."""
        return [self._shift(candidate) for candidate in self._inner.finalists()]

    @property
    def history(self) -> list[float]:
        """The inner strategy's."""
        return self._inner.history

    @property
    def notes(self) -> Sequence[str]:
        """The inner strategy's."""
        return self._inner.notes

    def _shift(self, candidate: Candidate) -> Candidate:
        return replace(candidate, factors=tuple(a * b for a, b in zip(candidate.factors, self._unit, strict=True)))
