"""First-order descent on log λ, and on the log of the attention factor, through the frozen model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from longrope_export.errors import NumericalError, ScalingError
from longrope_export.search.evaluator import mean_by_candidate
from longrope_export.search.protocol import SEARCH, VALIDATION, Outcome, Trial
from longrope_export.search.space import Candidate
from longrope_export.search.strategies.log_space import Array, Constraint, LogSpace


@dataclass(frozen=True, kw_only=True)
class GradientOptions:
    """How the descent moves; `None` for `documents_per_step` takes more documents a step as the budget grows.

    Pairs that turn more than `full_rate_turns` times within the window move slower in proportion: their gradient sums
    over many turns and is mostly noise, which Adam would scale up to full steps.

    Raises `ScalingError` when one is out of range.
    """

    learning_rate: float = 0.2
    attention_rate: float = 0.25
    full_rate_turns: float = 1.0
    warm_up: float = 0.1
    trust_region: float = 0.25
    average: float = 0.3
    patience: int = 3
    documents_per_step: int | None = None
    constraint: Constraint = "monotone"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "trust_region", "full_rate_turns"):
            _check(name, getattr(self, name), getattr(self, name) > 0.0, "above 0")
        _check("attention_rate", self.attention_rate, self.attention_rate >= 0.0, "at least 0")
        _check("warm_up", self.warm_up, 0.0 <= self.warm_up < 1.0, "from 0 to below 1")
        _check("average", self.average, 0.0 <= self.average <= 1.0, "from 0 to 1")
        _check("patience", self.patience, self.patience >= 1, "at least 1")
        per_step = self.documents_per_step
        _check("documents_per_step", per_step, per_step is None or per_step >= 1, "at least 1")
        if self.constraint not in get_args(Constraint):
            raise ScalingError(f"the constraint is {self.constraint!r}; choose {', '.join(get_args(Constraint))}")


def _check(name: str, value: object, right: bool, wanted: str) -> None:
    if not right:
        raise ScalingError(f"{name} is {value}; it must be {wanted}")


@dataclass(frozen=True)
class EarlyPart:
    """What the early steps are measured on: a part, its number of documents, and what is added there to (log λ …, log m).

    `shift` [pairs + 1] makes of a candidate for L' the one with the same structure for the shorter length.
    """

    part: str
    documents: int
    shift: Array


@dataclass(frozen=True)
class Descent:
    """The plan of one descent: how many steps, documents a step, how often it is validated, how many steps are early."""

    steps: int
    documents_per_step: int
    checkpoints: int
    early_steps: int = 0


class GradientDescent:
    """Adam on (log λ …, log attention), with warm-up, cosine decay to zero, a trust region, and averaged iterates.

    Each step takes the next documents of a seeded shuffle. At `checkpoints` evenly spaced steps the average of the
    last iterates is measured on the validation documents; after `patience` of them without a better one it stops.
    Where a gradient is not finite it ends, with a checkpoint of the iterates before and a line in `notes`.
    `early` is where the plan's early steps are measured.
    `turns` [pairs] is how often each pair turns within the window. Raises `NumericalError` for the first gradient.
    """

    def __init__(
        self,
        start: Candidate,
        options: GradientOptions,
        plan: Descent,
        space: LogSpace,
        *,
        learn_attention: bool,
        documents: int,
        validation_documents: int,
        turns: npt.ArrayLike,
        generator: np.random.Generator,
        parts: tuple[str, str] = (SEARCH, VALIDATION),
        early: EarlyPart | None = None,
    ) -> None:
        self._options, self._plan, self._space = options, plan, space
        self._start_tokens = start.start_tokens
        free = space.restrict(np.log(start.factors))
        self._position = np.append(free, math.log(start.attention_factor))
        slowed = np.minimum(1.0, options.full_rate_turns / np.asarray(turns, dtype=np.float64))
        self._rates = np.append(space.restrict(slowed), options.attention_rate if learn_attention else 0.0)
        self._project()
        self._adam = _Adam(len(self._position))
        self._shuffle = _Shuffle(documents, generator)
        self._early, self._early_shuffle = early, _Shuffle(early.documents, generator) if early else None
        self._validation, self._parts = validation_documents, parts
        self._step = 0
        self._ended = False
        self._path: list[Array] = []
        self._checkpoint: Candidate | None = None
        self._checkpoints: list[tuple[float, Candidate]] = []
        self.history: list[float] = []
        self.notes: list[str] = []
        # Where the last finite gradient was measured.
        self._measured = self._position.copy()

    def ask(self) -> list[Trial]:
        """A step's gradients, or a checkpoint's validation losses."""
        if self._checkpoint:
            return [Trial(self._checkpoint, self._parts[1], index) for index in range(self._validation)]
        if self._ended or self._step >= self._plan.steps or self._stalled():
            return []
        part, here, shuffle = self._parts[0], self._candidate(self._position), self._shuffle
        if self._early and self._early_shuffle and self._step < self._plan.early_steps:
            part, shuffle = self._early.part, self._early_shuffle
            here = self._candidate(self._position, self._early.shift)
        documents = shuffle.deal(self._plan.documents_per_step)
        return [Trial(here, part, document, gradient=True) for document in documents]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Move, or note the checkpoint."""
        if self._checkpoint:
            (loss,) = mean_by_candidate(outcomes, self._validation)
            self._checkpoints.append((loss, self._checkpoint))
            self._checkpoint = None
            return
        gradient = _mean_gradient(outcomes)
        if gradient is None:
            self._end()
            return
        self.history.append(math.fsum(outcome.loss for outcome in outcomes) / len(outcomes))
        self._measured = self._position.copy()
        self._move(np.append(self._space.gather(gradient[:-1]), gradient[-1]))
        self._path.append(self._position.copy())
        self._step += 1
        if self._step in self._checkpoint_steps():
            self._checkpoint = self._candidate(self._averaged())

    def finalists(self) -> list[Candidate]:
        """The averaged iterates at the checkpoints and the last iterate, latest first."""
        last = [self._candidate(self._position)] if self._step else []
        return list(dict.fromkeys([candidate for _, candidate in reversed(self._checkpoints)] + last))

    def _end(self) -> None:
        """Back to the last iterate whose gradient was finite; the one after it is no iterate."""
        if not self._step:
            raise NumericalError(
                "the gradient is NaN or infinite; lower --learning-rate, or use --dtype float32 or --strategy evolution"
            )
        self._ended = True
        self.notes.append(
            f"the gradient became NaN or infinite at step {self._step + 1} of {self._plan.steps}: the descent ended "
            "there; lower --learning-rate, or use --dtype float32"
        )
        self._position = self._measured
        self._path.pop()
        if self._path:
            self._checkpoint = self._candidate(self._averaged())

    def _move(self, gradient: Array) -> None:
        progress = (self._step + 1) / max(1.0, self._options.warm_up * self._plan.steps)
        decay = 0.5 * (1.0 + math.cos(math.pi * self._step / self._plan.steps))
        rate = self._options.learning_rate * min(1.0, progress) * decay
        change = -rate * self._rates * self._adam.direction(gradient)
        self._position += np.clip(change, -self._options.trust_region, self._options.trust_region)
        self._project()

    def _project(self) -> None:
        self._position[:-1] = self._space.project(self._position[:-1])

    def _averaged(self) -> Array:
        count = max(1, round(self._options.average * len(self._path)))
        return np.asarray(np.mean(self._path[-count:], axis=0))

    def _candidate(self, position: Array, shift: Array | float = 0.0) -> Candidate:
        logs = np.append(self._space.expand(position[:-1]), position[-1]) + shift
        return Candidate(tuple(np.exp(logs[:-1]).tolist()), math.exp(logs[-1]), self._start_tokens)

    def _checkpoint_steps(self) -> set[int]:
        count = self._plan.checkpoints
        return {round(self._plan.steps * (index + 1) / count) for index in range(count)}

    def _stalled(self) -> bool:
        losses = [loss for loss, _ in self._checkpoints]
        patience = self._options.patience
        return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


class _Adam:
    """Adam's direction with bias correction (arXiv 1412.6980); β₂ = 0.99 because there are few steps."""

    def __init__(self, size: int, beta1: float = 0.9, beta2: float = 0.99) -> None:
        self._first, self._second = np.zeros(size), np.zeros(size)
        self._betas, self._count = (beta1, beta2), 0

    def direction(self, gradient: Array) -> Array:
        beta1, beta2 = self._betas
        self._count += 1
        self._first = beta1 * self._first + (1.0 - beta1) * gradient
        self._second = beta2 * self._second + (1.0 - beta2) * gradient**2
        first = self._first / (1.0 - beta1**self._count)
        second = self._second / (1.0 - beta2**self._count)
        return np.asarray(first / (np.sqrt(second) + 1e-12))


def _mean_gradient(outcomes: Sequence[Outcome]) -> Array | None:
    """The mean [pairs + 1]; None where one is not finite."""
    gradients = np.array([outcome.gradient for outcome in outcomes], dtype=np.float64)
    return np.asarray(gradients.mean(axis=0)) if np.isfinite(gradients).all() else None


class _Shuffle:
    """Deals documents from one seeded shuffle after another; a hand never holds a document twice while it need not."""

    def __init__(self, count: int, generator: np.random.Generator) -> None:
        self._count, self._generator = count, generator
        self._queue: list[int] = []

    def deal(self, size: int) -> list[int]:
        while len(self._queue) < size:
            order = self._generator.permutation(self._count).tolist()
            self._queue += sorted(order, key=lambda document: document in self._queue)
        hand, self._queue = self._queue[:size], self._queue[size:]
        return hand
