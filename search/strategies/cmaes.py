"""CMA-ES on the increments of log λ, through the `cmaes` library: for black boxes and for polishing.

Source: N. Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772, which the library follows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from longrope_export.errors import MissingDependencyError, ScalingError
from longrope_export.search.evaluator import mean_by_candidate
from longrope_export.search.protocol import SEARCH, VALIDATION, Outcome, Trial
from longrope_export.search.space import Candidate
from longrope_export.search.strategies.log_space import Array, Constraint, LogSpace
from longrope_export.search.strategies.racing import Race, mean_loss

# The attention factor's spread, as a share of that of the slowest pair's log λ.
_ATTENTION_SHARE = 0.25
# Losses that are not finite are ranked last: the library's own arithmetic needs numbers.
_WORST = 1e9


@dataclass(frozen=True, kw_only=True)
class CmaOptions:
    """How the sampling begins: `sigma` is the first standard deviation of the slowest pair's log λ.

    `knots` is the number of increments, joined by straight lines over the pairs; None gives every pair its own.
    `population` None takes 4 + 3 ln(dimensions). Raises `ScalingError` when one is out of range.
    """

    sigma: float = 0.2
    knots: int | None = None
    population: int | None = None
    patience: int = 3
    constraint: Constraint = "none"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.sigma) and self.sigma > 0.0):
            raise ScalingError(f"sigma is {self.sigma}; it must be above 0")
        for name, value, least in (
            ("knots", self.knots, 1), ("population", self.population, 4), ("patience", self.patience, 1)
        ):  # fmt: skip
            if value is not None and value < least:
                raise ScalingError(f"{name} is {value}; it must be at least {least}")
        if self.constraint not in get_args(Constraint):
            raise ScalingError(f"the constraint is {self.constraint!r}; choose {', '.join(get_args(Constraint))}")

    def dimensions(self, size: int, learn_attention: bool) -> int:
        """Numbers that are sampled for `size` free pairs."""
        return max(2, min(self.knots or size, size) + learn_attention)

    def candidates(self, size: int, learn_attention: bool) -> int:
        """Candidates of a generation."""
        return self.population or 4 + math.floor(3.0 * math.log(self.dimensions(size, learn_attention)))


@dataclass(frozen=True)
class Sampling:
    """The plan of one run: evaluations (a candidate on all documents), and how often its mean is validated."""

    evaluations: int
    checkpoints: int


class CmaEs:
    """CMA-ES around `start`; every generation is one race on all search documents.

    After even shares of the evaluations the mean of the distribution is measured on the validation documents; after
    `patience` of them without a better one it stops. All randomness is the library's, seeded by `generator`, so that
    the same losses give the same candidates again. Raises `MissingDependencyError` without the library.
    """

    def __init__(
        self,
        start: Candidate,
        options: CmaOptions,
        plan: Sampling,
        space: LogSpace,
        *,
        learn_attention: bool,
        documents: int,
        validation_documents: int,
        generator: np.random.Generator,
        race: bool = False,
        parts: tuple[str, str] = (SEARCH, VALIDATION),
    ) -> None:
        self._start, self._options, self._plan, self._space = start, options, plan, space
        self._documents, self._validation, self._parts, self._eliminate = documents, validation_documents, parts, race
        self._learn = learn_attention
        self._origin = space.restrict(np.log(start.factors))
        self._ramps = ramps(space.size, min(options.knots or space.size, space.size))
        self._library = _library(
            options.dimensions(space.size, learn_attention), options.sigma,
            options.candidates(space.size, learn_attention), int(generator.integers(2**31)),
        )  # fmt: skip
        self._left = plan.evaluations * documents
        self._points: list[Array] = []
        self._race = Race([], parts[0], documents)
        self._best: tuple[float, Candidate] = (math.inf, start)
        self._validating: Candidate | None = None
        self._checkpoints: list[tuple[float, Candidate]] = []
        self.history: list[float] = []
        self.notes: list[str] = []

    def ask(self) -> list[Trial]:
        """What is left of a generation's race, a checkpoint's validation losses, or the next generation."""
        if self._validating:
            return [Trial(self._validating, self._parts[1], index) for index in range(self._validation)]
        if self._race.done and not self._begin():
            return []
        trials = self._race.ask()
        self._left -= len(trials)
        return trials

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Rank the generation when its race is over, or note the checkpoint."""
        if self._validating:
            (loss,) = mean_by_candidate(outcomes, self._validation)
            self._checkpoints.append((loss, self._validating))
            self._validating = None
            return
        self._race.tell(outcomes)
        if self._race.done:
            self._rank()
            if self._checkpoint_is_due():
                self._validating = self._candidate(self._library.mean)

    def finalists(self) -> list[Candidate]:
        """The means at the checkpoints, latest first, then the best candidate on the search documents."""
        means = [candidate for _, candidate in reversed(self._checkpoints)]
        return list(dict.fromkeys([*means, self._best[1]]))

    def _begin(self) -> bool:
        count = self._library.population_size
        if self._left < count * self._documents or self._stalled():
            return False
        self._points = [self._library.ask() for _ in range(count)]
        candidates = [self._candidate(point) for point in self._points]
        self._race = Race(candidates, self._parts[0], self._documents, eliminate=self._eliminate, keep=count // 2)
        return True

    def _rank(self) -> None:
        ranks = [min(value, _WORST) for value in self._race.ranking()]
        self._library.tell(list(zip(self._points, ranks)))
        for index, losses in self._race.survivors():
            loss = mean_loss(losses)
            if loss < self._best[0]:
                self._best = (loss, self._candidate(self._points[index]))
        self.history.append(self._best[0])

    def _candidate(self, point: Array) -> Candidate:
        free = self._origin + self._ramps @ point[: self._ramps.shape[1]]
        factors = np.exp(self._space.expand(self._space.project(free))).tolist()
        attention = self._start.attention_factor
        if self._learn:
            attention *= math.exp(_ATTENTION_SHARE * point[-1])
        return Candidate(tuple(factors), attention, self._start.start_tokens)

    def _checkpoint_is_due(self) -> bool:
        whole = self._plan.evaluations * self._documents
        spent = (whole - self._left) / whole
        last = self._left < self._library.population_size * self._documents
        return last or spent * self._plan.checkpoints >= len(self._checkpoints) + 1

    def _stalled(self) -> bool:
        losses = [loss for loss, _ in self._checkpoints]
        patience = self._options.patience
        return len(losses) > patience and min(losses[-patience:]) >= min(losses[:-patience])


def ramps(size: int, knots: int) -> Array:
    """What each increment adds to log λ, float64 [size, knots]: nothing before its knot, all of it from there on.

    Between two knots it grows in a straight line. The columns are scaled so that independent increments of variance 1
    give the last pair a log λ of variance 1, and faster pairs less.
    """
    places = np.linspace(0.0, size - 1.0, knots) if knots > 1 else np.array([size - 1.0])
    before = np.concatenate([[-1.0], places[:-1]])
    rise = (np.arange(size)[:, None] - before) / (places - before)
    return np.asarray(np.clip(rise, 0.0, 1.0) / math.sqrt(knots))


def _library(dimensions: int, sigma: float, population: int, seed: int) -> Any:
    try:
        from cmaes import CMA
    except ImportError:
        raise MissingDependencyError(
            "--strategy cmaes needs a package: pip install 'longrope-export[model]' (or cmaes)"
        ) from None
    return CMA(mean=np.zeros(dimensions), sigma=sigma, population_size=population, seed=seed)
