"""The operators of LongRoPE's released search, restated from what its code does, as a yardstick for benchmarks.

Source of the behaviour: microsoft/LongRoPE at c9e56aa, evolution/algorithms/{genetic_base,dim_mono}.py. What differs from
Algorithm 1 of the paper: the one seed is the wavelength-linear YaRN, all other individuals begin as its mutants; the last
λ may reach s + 1 instead of 1.25 s; a mutation sweeps over all pairs again and again until the result is monotone and
new; a crossover returns the first new monotone state, which is mostly parent 1 with one gene of parent 2; no n̂.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from longrope_export.search.protocol import SEARCH, Outcome, Trial
from longrope_export.search.space import Candidate, RopeNumbers

Genome = npt.NDArray[np.float64]

POPULATION, ITERATIONS, MUTATIONS, CROSSOVERS, PARENTS = 64, 40, 16, 16, 32
PROBABILITY, CROSSOVER_TRIES, STEP = 0.3, 20, 0.01


class ReleasedSearch:
    """The released search as a strategy: 64 + 40 × (16 + 16) evaluations of `documents` each."""

    def __init__(
        self, seed_factors: npt.ArrayLike, numbers: RopeNumbers, attention: float, documents: int, seed: int
    ) -> None:
        self._limit = 1.0 + numbers.scale
        self._attention, self._documents = attention, documents
        self._random = np.random.default_rng(seed)
        self._history: list[Genome] = []
        self._scored: list[tuple[float, int, Genome]] = []
        self._asked: list[Genome] = []
        self._seed_factors = np.asarray(seed_factors, dtype=np.float64)
        self._iteration = 0
        self.history: list[float] = []

    def ask(self) -> list[Trial]:
        """All candidates of the next generation on all documents."""
        if self._iteration > ITERATIONS:
            return []
        self._asked = self._children() if self._scored else self._first_population()
        return [
            Trial(self._candidate(genome), SEARCH, document)
            for genome in self._asked
            for document in range(self._documents)
        ]

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the best of all generations as parents."""
        losses = np.array([outcome.loss for outcome in outcomes]).reshape(len(self._asked), -1).mean(axis=1)
        born = len(self._history)
        scored = [(float(loss), born + index, genome) for index, (loss, genome) in enumerate(zip(losses, self._asked))]
        self._scored = sorted([*self._scored, *scored], key=lambda each: each[:2])[:PARENTS]
        self._iteration += 1
        self.history.append(self._scored[0][0])

    def finalists(self) -> list[Candidate]:
        """The candidate with the lowest loss on the search documents."""
        return [self._candidate(self._scored[0][2])]

    def _candidate(self, genome: Genome) -> Candidate:
        return Candidate(tuple(genome.tolist()), self._attention)

    def _first_population(self) -> list[Genome]:
        self._remember(self._seed_factors)
        return [self._seed_factors, *(self.mutate(self._seed_factors) for _ in range(POPULATION - 1))]

    def _children(self) -> list[Genome]:
        parents = [genome for _, _, genome in self._scored]
        mutants = [self.mutate(parents[self._random.integers(len(parents))]) for _ in range(MUTATIONS)]
        return mutants + [self._crossed(parents) for _ in range(CROSSOVERS)]

    def _crossed(self, parents: Sequence[Genome]) -> Genome:
        first, second = self._random.choice(len(parents), size=2, replace=False)
        child = self.cross(parents[first], parents[second])
        return self.mutate(parents[first]) if child is None else child

    def mutate(self, parent: Genome) -> Genome:
        """Sweeps over all pairs until the state is monotone and new: a long random walk from `parent`."""
        genome = parent.copy()
        while True:
            for pair in range(len(genome)):
                if self._random.random() < PROBABILITY:
                    genome[pair] = self._drawn(genome, pair)
            if _monotone(genome) and self._new(genome):
                return self._remember(genome)

    def cross(self, first: Genome, second: Genome) -> Genome | None:
        """The first new monotone state on the way from `first` towards `second`; broken states are carried on."""
        genome = first.copy()
        for _ in range(CROSSOVER_TRIES):
            for pair in range(len(genome)):
                if self._random.random() < PROBABILITY and self._random.random() < 0.5:
                    genome[pair] = second[pair]
                    if _monotone(genome) and self._new(genome):
                        return self._remember(genome)
        return None

    def _drawn(self, genome: Genome, pair: int) -> float:
        # np.arange, as there: its end may be overshot by one step, and an empty range leaves the gene alone.
        following = genome[pair + 1] if pair + 1 < len(genome) else self._limit
        values = np.arange(genome[pair - 1], following + STEP, STEP) if pair else np.arange(1.0, following, STEP)
        return float(values[self._random.integers(len(values))]) if len(values) else float(genome[pair])

    def _new(self, genome: Genome) -> bool:
        return not self._history or not np.isclose(np.array(self._history), genome).all(axis=1).any()

    def _remember(self, genome: Genome) -> Genome:
        self._history.append(genome.copy())
        return genome


def _monotone(genome: Genome) -> bool:
    return bool((np.diff(genome) >= 0.0).all())
