"""The three small protocols of a search: a strategy asks, an executor runs, an objective measures.

Any strategy works with any executor and any objective. The unit of all three is a `Trial`: one candidate on one
document. Strategies never see the clock, the executor or the order of arrival, so a seeded search has one result.
An executor is given passes: one trial each, or several candidates on one short document, which are measured together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from longrope_export.search.space import Candidate

SEARCH = "search"
VALIDATION = "validation"
SHORT_SEARCH = "short-search"
SHORT_VALIDATION = "short-validation"


@dataclass(frozen=True)
class Trial:
    """A question: the loss of `candidate` on a document of a part, and its gradient if asked for."""

    candidate: Candidate
    part: str
    document: int
    gradient: bool = False

    def to_json(self) -> list[Any]:
        """JSON-ready form, by which trials are compared."""
        return [self.part, self.document, self.gradient, self.candidate.to_json()]


@dataclass(frozen=True)
class Outcome:
    """An answer: mean cross entropy in nats per token (inf where not finite), and its gradient in (log λ …, log m).

    The gradient has [pairs + 1] values, in nats; it may hold ones that are not finite.
    """

    loss: float
    gradient: tuple[float, ...] | None = None


Pass = tuple[Trial, ...]


class Objective(Protocol):
    """Measures one trial."""

    def measure(self, trial: Trial) -> Outcome: ...


@runtime_checkable
class RowsObjective(Objective, Protocol):
    """An objective that can also measure several candidates as the rows of one forward pass."""

    def measure_rows(self, trials: Pass) -> tuple[Outcome, ...]: ...


def measured(objective: Objective, trials: Pass) -> tuple[Outcome, ...]:
    """The outcomes of a pass, one after another where it is one trial or the objective is no `RowsObjective`."""
    if len(trials) > 1 and isinstance(objective, RowsObjective):
        return objective.measure_rows(trials)
    return tuple(map(objective.measure, trials))


class TimedObjective(Objective, Protocol):
    """An objective that a budget in time can be turned into a number of evaluations with."""

    def measure_prefix(self, candidate: Candidate, part: str, length: int, *, gradient: bool) -> None: ...


class Executor(Protocol):
    """Runs passes anywhere and in any order; yields (index in `passes`, its trials' outcomes) as they finish."""

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]: ...


class Strategy(Protocol):
    """Proposes trials until it is finished."""

    def ask(self) -> list[Trial]:
        """The next trials, in (candidate, document) order; empty when the strategy is finished."""
        ...

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """The outcomes of the trials asked last, in their order."""
        ...

    def finalists(self) -> list[Candidate]:
        """Candidates for the final choice on the validation documents, the one expected to be best first."""
        ...
