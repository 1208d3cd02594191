"""RoPE's inverse frequencies, their wavelengths, and where a window ends among them (pure float64 numpy).

Convention: `rotary_dim` d has d/2 pairs; pair i rotates by θ^(−2i/d) radians a token, and a factor λ_i
divides that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from longrope_export.errors import ScalingError

Array = npt.NDArray[np.float64]


def inverse_frequencies(
    rope_theta: float, rotary_dim: int, factors: Sequence[float] | npt.NDArray[np.floating] | None = None
) -> Array:
    """Inverse frequencies θ^(−2i/d) / λ_i, in radians a token.

    Returns float64 [rotary_dim // 2]; `factors` are the divisors λ (ones when None). Raises `ScalingError`
    when the base is not above 1, `rotary_dim` is not even, or the number of factors differs from `rotary_dim
    // 2`. Source: RoFormer (arXiv 2104.09864, §3.2.2); LongRoPE (arXiv 2402.13753, eq. 2).
    """
    pairs = check_rotary(rope_theta, rotary_dim)
    unscaled = rope_theta ** (-2.0 * np.arange(pairs, dtype=np.float64) / rotary_dim)
    return unscaled if factors is None else unscaled / as_factors(factors, pairs)


def wavelengths(
    rope_theta: float, rotary_dim: int, factors: Sequence[float] | npt.NDArray[np.floating] | None = None
) -> Array:
    """Periods T_i = 2π λ_i θ^(2i/d) in tokens, float64 [rotary_dim // 2]; raises as `inverse_frequencies`."""
    return 2.0 * math.pi / inverse_frequencies(rope_theta, rotary_dim, factors)


def critical_index(rope_theta: float, rotary_dim: int, length: float, periods: float = 1.0) -> int:
    """First pair that turns fewer than `periods` times within `length` tokens; d/2 when there is none.

    `periods=1` gives LongRoPE2's theoretical critical dimension, `periods=10` the start of its sweep (both as
    pair indices: half of the paper's d_tcd). Raises `ScalingError` for impossible numbers. Source: arXiv
    2502.20082, eq. 7: ⌈(d/2) · log_b(L / (2π · periods))⌉.
    """
    pairs = check_rotary(rope_theta, rotary_dim)
    turns = _check_turns(length, periods)
    position = pairs * math.log(turns / (2.0 * math.pi)) / math.log(rope_theta)
    return min(max(math.ceil(position), 0), pairs)


def crossing(periods_of_pairs: Array, length: float, periods: float = 1.0) -> float:
    """Fractional pair index at which the wavelength reaches `length / periods`.

    Log-linear between pairs and beyond both ends: for unscaled RoPE this is (d/2) · log_b(L / (2π ·
    periods)), YaRN's correction dimension, and it stays right for a model whose wavelengths an earlier
    scaling has bent. Takes wavelengths [pairs ≥ 2]; raises `ScalingError` when they do not grow.
    """
    logs = np.log(periods_of_pairs)
    last = len(logs) - 1
    if last < 1 or not logs[-1] > logs[0]:
        raise ScalingError("this method needs at least two pairs whose wavelengths grow; use pi")
    target = math.log(_check_turns(length, periods))
    below = np.flatnonzero(logs < target)
    index = int(below[-1]) if len(below) else -1
    if 0 <= index < last:
        return float(index + (target - logs[index]) / (logs[index + 1] - logs[index]))
    end = max(index, 0)
    return float(end + (target - logs[end]) / ((logs[-1] - logs[0]) / last))


def check_rotary(rope_theta: float, rotary_dim: int) -> int:
    """Number of pairs; raises `ScalingError` when the base is not above 1 or the dimension not even."""
    if not (math.isfinite(rope_theta) and rope_theta > 1.0):
        raise ScalingError(f"rope_theta is {rope_theta}; it must be finite and greater than 1")
    if rotary_dim < 2 or rotary_dim % 2:
        raise ScalingError(f"rotary_dim is {rotary_dim}; it must be even and at least 2")
    return rotary_dim // 2


def as_factors(values: Sequence[float] | npt.NDArray[np.floating], pairs: int, name: str = "factors") -> Array:
    """Copy `values` to float64 [pairs]; raises `ScalingError` unless all are finite and above 0."""
    try:
        factors = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ScalingError(f"{name} must be a list of {pairs} numbers") from None
    if factors.shape != (pairs,):
        raise ScalingError(f"{name} has {factors.size} values; the model's rotary_dim needs {pairs}")
    if not (np.isfinite(factors).all() and (factors > 0.0).all()):
        raise ScalingError(f"{name} must be finite and greater than 0")
    return factors


def _check_turns(length: float, periods: float) -> float:
    if not (length > 0 and periods > 0 and math.isfinite(length / periods)):
        raise ScalingError(f"length {length} and periods {periods} must be greater than 0")
    return length / periods
