"""Passes in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from longrope_export.search.protocol import Objective, Outcome, Pass, measured


class InProcess:
    """Runs passes one after the other on a resident objective."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        """(index, outcomes) of every pass, in order."""
        for index, trials in enumerate(passes):
            yield index, measured(self._objective, trials)
