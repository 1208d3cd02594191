"""Objectives whose optimum is known, for tests of strategies and stages without a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors.local import InProcess
from longrope_export.search.protocol import SEARCH, VALIDATION, Executor, Outcome, Pass, Strategy, Trial, measured
from longrope_export.search.space import RopeNumbers

NUMBERS = RopeNumbers(rope_theta=10000.0, rotary_dim=16, window=256, target=1024)
GOAL = np.log([1.0, 1.0, 1.3, 2.0, 3.0, 4.0, 4.5, 4.2])
GOAL_ATTENTION = math.log(1.1)
DOCUMENTS = 3


@dataclass
class Bowl:
    """A quadratic in (log λ, log attention, n̂), shifted a little by the document; `hardness` is added by document."""

    goal: npt.NDArray[np.float64] = field(default_factory=GOAL.copy)
    hardness: Sequence[float] = (0.0,) * 16

    def measure(self, trial: Trial) -> Outcome:
        offset = np.log(trial.candidate.factors) - self.goal - 0.01 * trial.document
        attention = math.log(trial.candidate.attention_factor) - GOAL_ATTENTION
        loss = float(offset @ offset) + attention**2 + 1e-4 * abs(trial.candidate.start_tokens - 16)
        gradient = (*(2.0 * offset), 2.0 * attention)
        return Outcome(loss + self.hardness[trial.document], gradient if trial.gradient else None)


class LastFirst:
    """An executor whose results arrive in the opposite order."""

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        for index in reversed(range(len(passes))):
            yield index, measured(Bowl(), passes[index])


def bowl_evaluator(
    executor: Executor | None = None, seen: list[Trial] | None = None, sizes: dict[str, int] | None = None
) -> Evaluator:
    """An evaluator on three search and two validation documents; `seen` gets every distinct trial."""
    observer = (lambda trial, outcome, now: seen.append(trial)) if seen is not None else None
    return Evaluator(executor or InProcess(Bowl()), sizes or {SEARCH: DOCUMENTS, VALIDATION: 2}, observer=observer)


def serve(strategy: Strategy, executor: Executor | None = None, sizes: dict[str, int] | None = None) -> list[Trial]:
    """Run a strategy to its end and give every distinct trial."""
    seen: list[Trial] = []
    bowl_evaluator(executor, seen, sizes).run(strategy)
    return seen
