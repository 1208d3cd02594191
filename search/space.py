"""What is searched: a `Candidate`, the numbers of the model that it is for, and the paper's grid of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import ScalingError
from longrope_export.rope.frequencies import wavelengths
from longrope_export.rope.methods import Factors, compose, method_factors
from longrope_export.scaling import RopeScaling, to_float32

Genes = npt.NDArray[np.int64]

# LongRoPE, arXiv 2402.13753, table 4: the values of n̂.
START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)


@dataclass(frozen=True)
class Candidate:
    """One set of rescale factors λ, relative to what the model has now, with its attention factor and n̂.

    All reals are rounded to float32 on construction, so that what is measured is what a file will hold.
    """

    factors: tuple[float, ...]
    attention_factor: float = 1.0
    start_tokens: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", tuple(to_float32(value) for value in self.factors))
        object.__setattr__(self, "attention_factor", to_float32(self.attention_factor))

    def to_json(self) -> list[Any]:
        """JSON-ready `[factors, attention factor, n̂]`."""
        return [list(self.factors), self.attention_factor, self.start_tokens]


@dataclass(frozen=True, kw_only=True)
class ShortSet:
    """The set that a model with longrope factors applies up to `window` tokens: total divisors of the frequencies."""

    window: int
    factors: tuple[float, ...]
    attention_factor: float = 1.0
    start_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class RopeNumbers:
    """What a search must know of the model: base, rotary dimension, window L, target L', and its present factors.

    A model that was extended before has its long factors as `base_factors` (and their n̂), and in `switched` what it
    applies to short sequences: these keep their own window and factors. Raises `ScalingError` when the window does not grow.
    """

    rope_theta: float
    rotary_dim: int
    window: int
    target: int
    base_factors: tuple[float, ...] = ()
    base_attention_factor: float = 1.0
    base_start_tokens: int = 0
    switched: ShortSet | None = None

    def __post_init__(self) -> None:
        if self.target <= self.window:
            raise ScalingError(f"the window would go from {self.window:,} to {self.target:,} tokens; give a longer one")
        if not self.base_factors:
            object.__setattr__(self, "base_factors", (1.0,) * self.pairs)

    @property
    def pairs(self) -> int:
        """d/2."""
        return self.rotary_dim // 2

    @property
    def scale(self) -> float:
        """s = L'/L."""
        return self.target / self.window

    @property
    def existing(self) -> Factors:
        """The set that the model applies now."""
        return Factors(np.array(self.base_factors, dtype=np.float64), self.base_attention_factor)

    @property
    def turns(self) -> npt.NDArray[np.float64]:
        """How often each pair turns within the window L, float64 [pairs]."""
        return self.window / wavelengths(self.rope_theta, self.rotary_dim, self.base_factors)

    @property
    def short_window(self) -> int:
        """Tokens up to which the short set applies."""
        return self.switched.window if self.switched else self.window

    @property
    def short_scale(self) -> float:
        """L' in short windows."""
        return self.target / self.short_window

    def unchanged(self, attention_factor: float = 1.0) -> Candidate:
        """The candidate that leaves the model's frequencies as they are, and its attention unless a factor is given."""
        return Candidate((1.0,) * self.pairs, attention_factor, self.base_start_tokens)

    def short_original(self, attention_factor: float | None = None) -> Candidate:
        """The candidate that short sequences have now; its own attention factor unless one is given."""
        now = self.switched
        if now is None:
            return self.unchanged(1.0 if attention_factor is None else attention_factor)
        relative = self.unit(self.inside(now.window))
        own = now.attention_factor / self.base_attention_factor
        return Candidate(relative, own if attention_factor is None else attention_factor, now.start_tokens)

    def inside(self, target: int) -> RopeNumbers:
        """The numbers of the model as it treats sequences up to `target` tokens: its short set, where it has one."""
        now = self.switched
        if now is None or target > self.window:
            return self if target <= self.window else replace(self, target=target)
        return RopeNumbers(
            rope_theta=self.rope_theta, rotary_dim=self.rotary_dim, window=now.window,
            target=max(target, now.window + 1), base_factors=now.factors,
            base_attention_factor=now.attention_factor, base_start_tokens=now.start_tokens,
        )  # fmt: skip

    def unit(self, inside: RopeNumbers) -> tuple[float, ...]:
        """Factors [pairs] that make of λ relative to `inside` what it is relative to the present set."""
        return tuple(short / long for short, long in zip(inside.base_factors, self.base_factors, strict=True))

    def total_factors(self, candidate: Candidate) -> tuple[float, ...]:
        """Total divisors of the unscaled frequencies, float32: the candidate times what the model has now."""
        product = compose(self.existing.factors, np.array(candidate.factors, dtype=np.float64))
        return tuple(to_float32(float(value)) for value in product)

    def total_attention_factor(self, candidate: Candidate) -> float:
        """The number that multiplies cos and sin, float32."""
        return to_float32(candidate.attention_factor * self.base_attention_factor)

    def record(self, long: Candidate, short: Candidate, provenance: Mapping[str, Any]) -> RopeScaling:
        """The scaling record of a long and a short candidate."""
        kept = short.factors == self.short_original().factors  # the product would round the last bit
        return RopeScaling(
            rope_theta=self.rope_theta,
            rotary_dim=self.rotary_dim,
            original_max_position_embeddings=self.short_window,
            max_position_embeddings=self.target,
            long_factor=self.total_factors(long),
            short_factor=self.switched.factors if self.switched and kept else self.total_factors(short),
            long_attention_factor=self.total_attention_factor(long),
            short_attention_factor=self.total_attention_factor(short),
            long_start_tokens=long.start_tokens,
            short_start_tokens=short.start_tokens,
            provenance=provenance,
        )


def closed_form(name: str, numbers: RopeNumbers, attention_factor: float | None = None) -> Candidate:
    """The candidate of a closed-form method, on top of what the model has; its own attention factor unless given.

    Its factors [pairs] are relative to the present ones, for the window `numbers.target`.

    Raises `ScalingError` for an unknown method or a model that it cannot serve.
    """
    result = method_factors(
        name,
        rope_theta=numbers.rope_theta,
        rotary_dim=numbers.rotary_dim,
        original_max_position_embeddings=numbers.window,
        max_position_embeddings=numbers.target,
        existing=numbers.existing,
        attention_factor=attention_factor,
    )
    return Candidate(tuple(result.factors.tolist()), result.attention_factor, numbers.base_start_tokens)


@dataclass(frozen=True)
class Individual:
    """A point of the grid: λ_i = 1 + genes[i] · step, and the value of n̂; of LongRoPE2's, also its critical index."""

    genes: tuple[int, ...]
    start_tokens: int = 0
    critical: int = 0


@dataclass(frozen=True)
class PaperSpace:
    """LongRoPE's search space (table 4): λ in 1…`bound` by `step`, non-decreasing over the pairs, and n̂ from a list.

    Every operation keeps λ non-decreasing by construction or by sorting, so none is ever drawn in vain: the released
    code's rejection loop needs 26 to 122 sweeps for one mutant.
    """

    pairs: int
    bound: float
    step: float = 0.01
    start_tokens: tuple[int, ...] = START_TOKENS

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step) and self.step > 0.0):
            raise ScalingError(f"the grid's step is {self.step}; it must be greater than 0")
        if not (math.isfinite(self.bound) and self.bound >= 1.0 + self.step):
            raise ScalingError(f"the bound is {self.bound}; it must be at least 1 + step = {1.0 + self.step}")
        if not self.start_tokens or min(self.start_tokens) < 0:
            raise ScalingError("the list of start tokens must hold at least one number, none below 0")

    @property
    def top(self) -> int:
        """Largest gene."""
        return math.floor((self.bound - 1.0) / self.step + 1e-9)

    def candidate(self, individual: Individual, attention_factor: float) -> Candidate:
        """λ, attention factor and n̂ of a grid point."""
        factors = tuple(1.0 + gene * self.step for gene in individual.genes)
        return Candidate(factors, attention_factor, individual.start_tokens)

    def first(self, seeds: Sequence[Candidate], count: int, generator: np.random.Generator) -> list[Individual]:
        """The seeds on the grid: the first of `count` individuals, whose others are their mutants."""
        return [self.nearest(seed.factors) for seed in seeds]

    def nearest(self, factors: Sequence[float]) -> Individual:
        """The grid point next to `factors`, clipped to the bounds and made non-decreasing by a running maximum."""
        genes = np.rint((np.asarray(factors, dtype=np.float64) - 1.0) / self.step).astype(np.int64)
        return _individual(np.maximum.accumulate(np.clip(genes, 0, self.top)), self.start_tokens[0])

    def mutate(self, parent: Individual, probability: float, generator: np.random.Generator) -> Individual:
        """Redraw each gene with `probability`, uniformly between the next smaller and the next larger λ, and n̂."""
        genes = redrawn(np.array(parent.genes, dtype=np.int64), 0, self.top, probability, generator)
        return _individual(genes, redrawn_start(parent, self.start_tokens, probability, generator))

    def cross(self, first: Individual, second: Individual, generator: np.random.Generator) -> Individual:
        """Take each gene and n̂ from either parent; sorting then keeps every λ between its two parents'."""
        of_first = generator.random(self.pairs) < 0.5
        genes = np.sort(np.where(of_first, first.genes, second.genes))
        start = first.start_tokens if generator.random() < 0.5 else second.start_tokens
        return _individual(genes, start)


def redrawn(genes: Genes, low: int, top: int, probability: float, generator: np.random.Generator) -> Genes:
    """Non-decreasing genes [n], each redrawn with `probability` between the next smaller and the next larger one.

    `low` and `top` stand beyond the ends. Between the *neighbours* a gene inside a flat run (PI is one, YaRN has two)
    could never move. Sorting brings redrawn members of a run into order; others are in order already or change places
    with a neighbour.
    """
    distinct = np.concatenate([[low], np.unique(genes), [top]])
    place = np.searchsorted(distinct[1:-1], genes) + 1
    drawn = generator.integers(distinct[place - 1], distinct[place + 1], endpoint=True)
    chosen = generator.random(len(genes)) < probability
    return np.sort(np.where(chosen, drawn, genes))


def redrawn_start(parent: Individual, values: Sequence[int], probability: float, generator: np.random.Generator) -> int:
    """n̂ of a mutant: with `probability` any of `values`, else the parent's."""
    if generator.random() < probability:
        return values[int(generator.integers(len(values)))]
    return parent.start_tokens


def _individual(genes: Genes, start_tokens: int) -> Individual:
    return Individual(tuple(int(gene) for gene in genes), start_tokens)
