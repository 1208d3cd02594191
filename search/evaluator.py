"""Answers trials from the journal where it can, else from the executor, and counts what was measured."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from longrope_export.search.journal import Journal
from longrope_export.search.protocol import Executor, Outcome, Pass, Strategy, Trial
from longrope_export.search.space import Candidate

Observer = Callable[[Trial, Outcome, bool], None]


class Evaluator:
    """Asks each distinct trial once: the same candidate on the same document never gets a second outcome.

    `documents` holds the number of documents of each part, `rows` how many candidates on one of its documents make a
    pass, where it is not one. `observer(trial, outcome, measured_now)` is told of every
    distinct trial once: of measured ones as they arrive, then of those that the journal knows.
    """

    def __init__(
        self,
        executor: Executor,
        documents: Mapping[str, int],
        journal: Journal | None = None,
        observer: Observer | None = None,
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.documents = dict(documents)
        self._rows = dict(rows or {})
        self.asked: Counter[tuple[str, bool]] = Counter()
        self._executor = executor
        self._journal = journal
        self._observer = observer
        self._known: dict[Trial, Outcome] = {}

    def evaluate(self, trials: Sequence[Trial]) -> list[Outcome]:
        """Outcomes of `trials`, in their order; new ones are in the journal before this returns."""
        fresh = [trial for trial in dict.fromkeys(trials) if trial not in self._known]
        first = sum(self.asked.values())
        numbers = {trial: first + index for index, trial in enumerate(fresh)}
        self.asked.update((trial.part, trial.gradient) for trial in fresh)
        stored = {trial: self._recorded(number, trial) for trial, number in numbers.items()}
        # A pass holds the same trials whatever the journal knows of them: they are rounded alike after a kill.
        passes = [each for each in self._passes(fresh) if any(stored[trial] is None for trial in each)]
        measured = self._measure(passes, {trial: number for trial, number in numbers.items() if stored[trial] is None})
        for trial in fresh:
            self._known[trial] = stored[trial] or measured[trial]
            if self._observer and stored[trial]:
                self._observer(trial, self._known[trial], False)
        return [self._known[trial] for trial in trials]

    def mean_losses(self, candidates: Sequence[Candidate], part: str, documents: int | None = None) -> list[float]:
        """Mean loss of each candidate over the first `documents` documents (all of them when None) of a part."""
        count = self.documents[part] if documents is None else documents
        outcomes = self.evaluate([Trial(each, part, index) for each in candidates for index in range(count)])
        return mean_by_candidate(outcomes, count)

    def best_known(self, part: str) -> tuple[Candidate, float] | None:
        """The candidate with the lowest mean loss of those measured on all documents of a part, the earliest in a tie."""
        losses: dict[Candidate, list[float]] = {}
        for trial, outcome in self._known.items():
            if trial.part == part and not trial.gradient:
                losses.setdefault(trial.candidate, []).append(outcome.loss)
        count = self.documents[part]
        means = {each: math.fsum(found) / count for each, found in losses.items() if len(found) == count}
        return min(means.items(), key=lambda item: item[1], default=None)

    def run(self, strategy: Strategy) -> None:
        """Serve `strategy` until it asks nothing more."""
        while trials := strategy.ask():
            strategy.tell(self.evaluate(trials))

    def _recorded(self, number: int, trial: Trial) -> Outcome | None:
        return self._journal.recorded(number, trial) if self._journal else None

    def _passes(self, trials: Sequence[Trial]) -> list[Pass]:
        """Trials in their order, those of one short document filled up to a whole pass with the next ones on it."""
        passes: list[list[Trial]] = []
        last: dict[tuple[str, int, bool], list[Trial]] = {}
        for trial in trials:
            most = 1 if trial.gradient else self._rows.get(trial.part, 1)
            key = trial.part, trial.document, trial.gradient
            if len(last.get(key, ())) % most == 0:
                last[key] = []
                passes.append(last[key])
            last[key].append(trial)
        return [tuple(each) for each in passes]

    def _measure(self, passes: Sequence[Pass], numbers: Mapping[Trial, int]) -> dict[Trial, Outcome]:
        """What was measured of the trials that have `numbers`; the others of a pass are known already."""
        results: dict[Trial, Outcome] = {}
        started = time.perf_counter()
        for index, outcomes in self._executor.run(passes) if passes else ():
            now = time.perf_counter()
            seconds, started = (now - started) / len(outcomes), now
            for trial, outcome in zip(passes[index], outcomes):
                if trial not in numbers:
                    continue
                if self._journal:
                    self._journal.append(numbers[trial], trial, outcome, seconds)
                results[trial] = self._known[trial] = outcome
                if self._observer:
                    self._observer(trial, outcome, True)
        return results


def mean_by_candidate(outcomes: Sequence[Outcome], documents: int) -> list[float]:
    """Means of consecutive groups of `documents` losses; inf where one is not finite."""
    return [
        math.fsum(outcome.loss for outcome in outcomes[start : start + documents]) / documents
        for start in range(0, len(outcomes), documents)
    ]
