"""The logarithms of λ that an optimiser moves: all of them, or those above a critical pair that the others follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from longrope_export.errors import ScalingError

Array = npt.NDArray[np.float64]
Constraint = Literal["none", "monotone", "paper"]


@dataclass(frozen=True)
class LogSpace:
    """log λ of every pair from the free ones, x = log λ_c … log λ_last: below the critical pair c, λ_i = λ_c^(i/c).

    With `critical` 0 every pair is free. `bound` is the largest λ of the constraint "paper". Raises `ScalingError` for
    an index that no pair has. Source of the structure: LongRoPE2, arXiv 2502.20082, algorithm 2.
    """

    pairs: int
    critical: int = 0
    constraint: Constraint = "none"
    bound: float = np.inf

    def __post_init__(self) -> None:
        if not 0 <= self.critical < self.pairs:
            raise ScalingError(f"the critical index is {self.critical}; it must be from 0 to {self.pairs - 1}")

    @property
    def size(self) -> int:
        """Number of free values."""
        return self.pairs - self.critical

    def restrict(self, values: npt.ArrayLike) -> Array:
        """The entries [size] of the free pairs, of one value per pair [pairs]."""
        return np.array(values, dtype=np.float64)[self.critical :]

    def expand(self, free: Array) -> Array:
        """log λ [pairs] from the free ones [size]."""
        return np.concatenate([self._shares * free[0], free])

    def gather(self, gradient: Array) -> Array:
        """The gradient [size] in the free values from the one in log λ [pairs]."""
        gathered = gradient[self.critical :].copy()
        gathered[0] += self._shares @ gradient[: self.critical]
        return gathered

    def project(self, free: Array) -> Array:
        """The nearest free values whose λ keep to the constraint: non-decreasing, and within 1 … `bound` for "paper"."""
        if self.constraint == "none":
            return free
        ordered = isotonic(free)
        if self.constraint == "paper":
            return np.clip(ordered, 0.0, np.log(self.bound))
        # Below the critical pair λ grows from 1 to λ_c: it does not fall only where λ_c is at least 1.
        return np.maximum(ordered, 0.0) if self.critical else ordered

    @property
    def _shares(self) -> Array:
        return np.arange(self.critical) / max(self.critical, 1)


def isotonic(values: Array) -> Array:
    """The nearest non-decreasing sequence in least squares, float64 [n] from float64 [n] (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values.tolist():
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (right, many), (left, more) = pools.pop(), pools.pop()
            pools.append(((right * many + left * more) / (many + more), many + more))
    return np.array([mean for mean, count in pools for _ in range(count)])
