"""LongRoPE2's search space: a critical index per individual, the grid from s on above it, NTK below it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longrope_export.errors import ScalingError
from longrope_export.search.space import Candidate, Genes, Individual, redrawn, redrawn_start


@dataclass(frozen=True)
class CriticalSpace:
    """λ from `scale` to `bound` by `step`, non-decreasing, from the critical pair c on; below it λ_i = λ_c^(i/c).

    c is one of `indices`, and belongs to the individual: the population selects it. Genes below c stand for the grid
    points next to these λ, so that a child with a smaller index can take them over. Raises `ScalingError` for an empty
    grid. Source: LongRoPE2, arXiv 2502.20082, equations 9 and 10 (λ ≥ s) and algorithms 1 and 2; n̂ and crossovers, which
    it leaves out, are Algorithm 1's of LongRoPE.
    """

    pairs: int
    indices: tuple[int, ...]
    scale: float
    bound: float
    step: float = 0.01
    start_tokens: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step) and self.step > 0.0):
            raise ScalingError(f"the grid's step is {self.step}; it must be greater than 0")
        if not (math.isfinite(self.bound) and self.top >= self.low):
            raise ScalingError(
                f"the bound is {self.bound}; above the critical pair λ go from s = {self.scale} up to it"
            )

    @property
    def low(self) -> int:
        """Smallest gene from the critical pair on: λ ≥ s there."""
        return math.ceil((self.scale - 1.0) / self.step - 1e-9)

    @property
    def top(self) -> int:
        """Largest gene."""
        return math.floor((self.bound - 1.0) / self.step + 1e-9)

    def candidate(self, individual: Individual, attention_factor: float) -> Candidate:
        """λ, attention factor and n̂ of an individual."""
        factors = 1.0 + np.array(individual.genes) * self.step
        factors[: individual.critical] = self._below(float(factors[individual.critical]), individual.critical)
        return Candidate(tuple(factors.tolist()), attention_factor, individual.start_tokens)

    def first(self, seeds: Sequence[Candidate], count: int, generator: np.random.Generator) -> list[Individual]:
        """Algorithm 1's `count` individuals: the indices by turns, all pairs from there on at one λ drawn from the grid.

        `seeds` are for other spaces: LongRoPE2 has none.
        """
        found = []
        for number in range(count):
            critical = self.indices[number % len(self.indices)]
            tail = int(generator.integers(self.low, self.top, endpoint=True))
            found.append(self._individual(np.full(self.pairs - critical, tail), critical, self.start_tokens[0]))
        return found

    def mutate(self, parent: Individual, probability: float, generator: np.random.Generator) -> Individual:
        """Algorithm 2: redraw the genes from the critical pair on, and n̂; the pairs below follow, the index stays."""
        free = np.array(parent.genes[parent.critical :], dtype=np.int64)
        free = redrawn(free, self.low, self.top, probability, generator)
        start = redrawn_start(parent, self.start_tokens, probability, generator)
        return self._individual(free, parent.critical, start)

    def cross(self, first: Individual, second: Individual, generator: np.random.Generator) -> Individual:
        """Take the index, n̂, and each gene from there on from either parent; sorted, and none below s."""
        critical = first.critical if generator.random() < 0.5 else second.critical
        of_first = generator.random(self.pairs) < 0.5
        mixed = np.where(of_first, first.genes, second.genes)[critical:]
        start = first.start_tokens if generator.random() < 0.5 else second.start_tokens
        return self._individual(np.sort(np.maximum(mixed, self.low)), critical, start)

    def _individual(self, free: Genes, critical: int, start_tokens: int) -> Individual:
        below = np.rint((self._below(1.0 + float(free[0]) * self.step, critical) - 1.0) / self.step)
        return Individual(tuple(int(gene) for gene in (*below, *free)), start_tokens, critical)

    @staticmethod
    def _below(factor: float, critical: int) -> npt.NDArray[np.float64]:
        return np.asarray(factor ** (np.arange(critical) / max(critical, 1)))
