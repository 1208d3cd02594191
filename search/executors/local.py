"""Trials in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longrope_export.search.protocol import Objective, Outcome, Trial


class InProcess:
    """Runs trials one after the other on a resident objective."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]:
        """(index, outcome) of every trial, in order."""
        for index, trial in enumerate(trials):
            yield index, self._objective.measure(trial)
