"""LongRoPE's evolution search, Algorithm 1 of arXiv 2402.13753; with LongRoPE2's space, that of arXiv 2502.20082."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from longrope_export.errors import ScalingError
from longrope_export.search.protocol import SEARCH, Outcome, Trial
from longrope_export.search.space import Candidate, Individual
from longrope_export.search.strategies.racing import Race, mean_loss

# Draws of a child that was seen before, until the child is given up: only a nearly exhausted grid comes to this.
_DRAWS = 100


@dataclass(frozen=True, kw_only=True)
class EvolutionOptions:
    """Algorithm 1's sizes: P, T, N1, N2, k and p. In full they cost P + T (N1 + N2) = 1,344 evaluations.

    Raises `ScalingError` when one of them is out of range.
    """

    population: int = 64
    iterations: int = 40
    mutations: int = 16
    crossovers: int = 16
    parents: int = 32
    mutation_probability: float = 0.3

    def __post_init__(self) -> None:
        for name, least in (("population", 1), ("iterations", 0), ("mutations", 0), ("crossovers", 0), ("parents", 2)):
            if getattr(self, name) < least:
                raise ScalingError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0.0 < self.mutation_probability <= 1.0:
            raise ScalingError(
                f"the mutation probability is {self.mutation_probability}; it must be above 0, at most 1"
            )

    def quarter(self) -> EvolutionOptions:
        """A population a quarter as large, for the short set."""
        return replace(
            self,
            population=max(1, self.population // 4),
            mutations=self.mutations // 4,
            crossovers=self.crossovers // 4,
            parents=max(2, self.parents // 4),
        )

    def halved(self) -> EvolutionOptions:
        """The paper's sizes beyond 512k tokens: P, N1 and N2 halved."""
        return replace(
            self,
            population=max(1, self.population // 2),
            mutations=self.mutations // 2,
            crossovers=self.crossovers // 2,
        )

    @property
    def evaluations(self) -> int:
        """Evaluations of a full run."""
        return self.population + self.iterations * (self.mutations + self.crossovers)


class Space(Protocol):
    """What individuals are and how they vary: `PaperSpace` or `CriticalSpace`."""

    def first(self, seeds: Sequence[Candidate], count: int, generator: np.random.Generator) -> list[Individual]:
        """The individuals that a population of `count` begins with."""
        ...

    def candidate(self, individual: Individual, attention_factor: float) -> Candidate:
        """What is measured of an individual."""
        ...

    def mutate(self, parent: Individual, probability: float, generator: np.random.Generator) -> Individual:
        """A mutant."""
        ...

    def cross(self, first: Individual, second: Individual, generator: np.random.Generator) -> Individual:
        """A child of two."""
        ...


class Evolution:
    """Algorithm 1: seeds and their mutants, then per iteration N1 mutants and N2 crossovers of the best k so far.

    `seeds` become the nearest grid points where the space is LongRoPE's. One evaluation is one candidate on all
    `documents` of `part`; after `evaluations` of them it stops wherever it is. A candidate is never proposed twice. With
    `race` (not in the paper) candidates that will clearly not be among the best k are dropped before all documents are
    measured. `losses` has the best loss by critical index.
    """

    def __init__(
        self,
        space: Space,
        seeds: Sequence[Candidate],
        options: EvolutionOptions,
        *,
        documents: int,
        evaluations: int,
        attention_factor: float,
        generator: np.random.Generator,
        part: str = SEARCH,
        race: bool = False,
    ) -> None:
        self._space, self._options, self._generator, self._eliminate = space, options, generator, race
        self._seeds = space.first(seeds, options.population, generator)
        self._documents, self._part, self._attention = documents, part, attention_factor
        self._left = evaluations * documents
        self._iteration = 0
        self._asked: list[Individual] = []
        self._race = Race([], part, documents)
        self._seen: set[Individual] = set()
        self._told = 0
        self._scored: list[tuple[float, int, Individual, list[float]]] = []
        self.losses: dict[int, float] = {}
        self.history: list[float] = []
        self.notes: list[str] = []

    def ask(self) -> list[Trial]:
        """All trials of the next generation, or what is left of this one's race."""
        if self._race.done and not self._begin():
            return []
        trials = self._race.ask()
        self._left -= len(trials)
        return trials

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Rank the generation among the best k so far; the earlier one wins a tie."""
        self._race.tell(outcomes)
        if not self._race.done:
            return
        scored = [
            (mean_loss(losses), self._told + index, self._asked[index], losses)
            for index, losses in self._race.survivors()
        ]
        for loss, _, individual, _ in scored:
            self.losses[individual.critical] = min(loss, self.losses.get(individual.critical, math.inf))
        self._told += len(self._asked)
        self._scored = sorted(self._scored + scored, key=lambda each: each[:2])[: self._options.parents]
        self._iteration += 1
        self.history.append(self._scored[0][0] if self._scored else math.inf)

    def _begin(self) -> bool:
        affordable = self._left // self._documents
        if self._iteration > self._options.iterations or affordable <= 0:
            return False
        proposed = self._children() if self._scored else self._first_population()
        self._asked = proposed[:affordable]
        self._race = Race(
            [self._candidate(each) for each in self._asked], self._part, self._documents, eliminate=self._eliminate,
            keep=self._options.parents, incumbents=[losses for *_, losses in self._scored],
        )  # fmt: skip
        return bool(self._asked)

    def finalists(self) -> list[Candidate]:
        """The candidate with the lowest loss on the search documents."""
        return [self._candidate(self._scored[0][2])] if self._scored else []

    def _candidate(self, individual: Individual) -> Candidate:
        return self._space.candidate(individual, self._attention)

    def _first_population(self) -> list[Individual]:
        population = list(dict.fromkeys(self._seeds))
        self._seen.update(population)
        while len(population) < self._options.population:
            if not (mutant := self._new(lambda: self._mutant(self._seeds))):
                break
            population.append(mutant)
        return population[: self._options.population]

    def _children(self) -> list[Individual]:
        parents = [individual for _, _, individual, _ in self._scored]
        mutants = (self._new(lambda: self._mutant(parents)) for _ in range(self._options.mutations))
        children = [each for each in mutants if each]
        crossed = (self._new(lambda: self._crossover(parents)) for _ in range(self._options.crossovers))
        return children + [each for each in crossed if each]

    def _mutant(self, parents: Sequence[Individual]) -> Individual:
        parent = parents[int(self._generator.integers(len(parents)))]
        return self._space.mutate(parent, self._options.mutation_probability, self._generator)

    def _crossover(self, parents: Sequence[Individual]) -> Individual:
        if len(parents) < 2:
            return self._mutant(parents)
        first, second = self._generator.choice(len(parents), size=2, replace=False)
        child = self._space.cross(parents[int(first)], parents[int(second)], self._generator)
        # Two parents that are alike have no new child: it is moved on instead of being measured again.
        return (
            self._space.mutate(child, self._options.mutation_probability, self._generator)
            if child in self._seen
            else child
        )

    def _new(self, draw: Callable[[], Individual]) -> Individual | None:
        for _ in range(_DRAWS):
            individual = draw()
            if individual not in self._seen:
                self._seen.add(individual)
                return individual
        return None
