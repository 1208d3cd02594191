"""The closed-form divisors λ and attention factors of the published methods: arrays in, arrays out.

All take wavelengths in tokens or plain numbers and return float64 [pairs]; s = L'/L is the extension ratio.
"""

from __future__ import annotations

import math

import numpy as np

from longrope_export.errors import ScalingError
from longrope_export.rope.frequencies import Array, as_factors, crossing


def position_interpolation(pairs: int, scale: float) -> Array:
    """λ_i = s. Source: PI, arXiv 2306.15595."""
    return np.full(pairs, float(scale))


def base_change(rope_theta: float, new_rope_theta: float, pairs: int) -> Array:
    """λ_i = (b'/b)^(2i/d), the divisors equal to another RoPE base. Source: ABF, arXiv 2309.16039."""
    return (new_rope_theta / rope_theta) ** (np.arange(pairs) / pairs)


def ntk_base(rope_theta: float, rotary_dim: int, scale: float) -> float:
    """NTK-aware base b' = b · s^(d/(d−2)). Source: jquesnelle/yarn, LlamaNTKScaledRotaryEmbedding.py."""
    _check_ntk(rotary_dim // 2)
    return float(rope_theta * scale ** (rotary_dim / (rotary_dim - 2)))


def ntk_aware(pairs: int, scale: float) -> Array:
    """λ_i = s^(2i/(d−2)): 1 at the fastest pair, s at the slowest; the divisors of `ntk_base`.

    Raises `ScalingError` for a single pair. Source: as `ntk_base`.
    """
    _check_ntk(pairs)
    return float(scale) ** (np.arange(pairs) / (pairs - 1))


def dynamic_ntk_scale(length: float, original: float, factor: float = 1.0) -> float:
    """NTK-aware's s for the current length n: max(1, k·n/L − (k − 1)).

    Source: arXiv 2309.00071, §3.3; transformers `_compute_dynamic_ntk_parameters`, where k is `factor`.
    """
    return max(1.0, factor * length / original - (factor - 1.0))


def critical_dimension_base(rope_theta: float, length: float, target: float) -> float:
    """Smallest base that keeps every pair inside trained angles at L': b^(log_{L/2π}(L'/2π)).

    Raises `ScalingError` when the window does not exceed 2π tokens. Source: Liu et al., arXiv 2310.05209.
    """
    if length <= 2.0 * math.pi:
        raise ScalingError(f"a window of {length} tokens has no critical dimension; it must exceed 2π")
    return float(rope_theta ** (math.log(target / (2.0 * math.pi)) / math.log(length / (2.0 * math.pi))))


def critical_dimension_ntk(wavelengths: Array, length: float, scale: float) -> Array:
    """λ_i = s^(i/c) with c the fractional index where the wavelength reaches L, so λ ≥ s from there up.

    Equals `critical_dimension_base`'s divisors on unscaled wavelengths. Raises `ScalingError` when even the
    fastest pair does not complete a period within L.
    """
    critical = crossing(wavelengths, length)
    if critical <= 0.0:
        raise ScalingError(f"a window of {length} tokens has no critical dimension; the fastest pair exceeds it")
    return float(scale) ** (np.arange(len(wavelengths)) / critical)


def llama3(
    wavelengths: Array,
    length: float,
    scale: float,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Array:
    """Llama-3.1's by-parts scaling: λ = 1 below L/high, s above L/low, frequency-linear in L/T between.

    Raises `ScalingError` unless high > low > 0. Source: transformers `_compute_llama3_parameters`.
    """
    if not 0.0 < low_freq_factor < high_freq_factor:
        raise ScalingError("low_freq_factor must be greater than 0 and less than high_freq_factor")
    smooth = (length / wavelengths - low_freq_factor) / (high_freq_factor - low_freq_factor)
    return frequency_blend(np.clip(smooth, 0.0, 1.0), scale)


def yarn_kept_share(
    wavelengths: Array, length: float, beta_fast: float = 32.0, beta_slow: float = 1.0, truncate: bool = True
) -> Array:
    """YaRN's γ in 0…1 for every pair: 1 keeps the frequency, 0 divides it by s; linear in the pair *index*.

    The ramp runs between the pairs that turn `beta_fast` and `beta_slow` times within L, rounded outwards
    when `truncate`. Raises `ScalingError` unless beta_fast ≥ beta_slow > 0. Source: jquesnelle/yarn,
    LlamaYaRNScaledRotaryEmbedding.py; transformers `_compute_yarn_parameters`.
    """
    low, high = yarn_ramp(wavelengths, length, beta_fast, beta_slow, truncate)
    ramp: Array = np.clip((np.arange(len(wavelengths)) - low) / (high - low), 0.0, 1.0)
    return 1.0 - ramp


def yarn_ramp(
    wavelengths: Array, length: float, beta_fast: float = 32.0, beta_slow: float = 1.0, truncate: bool = True
) -> tuple[float, float]:
    """Pair indices (low, high) between which YaRN's ramp runs; sources and errors as `yarn_kept_share`."""
    if not 0.0 < beta_slow <= beta_fast:
        raise ScalingError("beta_slow must be greater than 0 and not above beta_fast")
    low, high = crossing(wavelengths, length, beta_fast), crossing(wavelengths, length, beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    # Upstream bounds the upper end by the dimension, not by the number of pairs: kept, or λ differs for small
    # L.
    low, high = max(low, 0.0), min(high, 2.0 * len(wavelengths) - 1.0)
    return low, high + 0.001 if high == low else high


def frequency_blend(kept: Array, scale: float) -> Array:
    """λ = 1 / ((1 − γ)/s + γ): linear between the two *frequencies* (YaRN's released code, transformers)."""
    return 1.0 / ((1.0 - kept) / scale + kept)


def wavelength_blend(kept: Array, scale: float) -> Array:
    """λ = s (1 − γ) + γ: linear between the *wavelengths* (PoSE's `revised_yarn`, LongRoPE's search seed)."""
    return scale * (1.0 - kept) + kept


def longrope2(pairs: int, critical: int, tail: Array) -> Array:
    """λ_i = λ_c^(i/c) below the critical pair c, and `tail` (λ_c and above) from it.

    Raises `ScalingError` when c is not 0…pairs − 1 or the tail's length is not pairs − c.
    Source: LongRoPE2, arXiv 2502.20082, algorithm 2; microsoft/LongRoPE branch longrope2.
    """
    if not 0 <= critical < pairs:
        raise ScalingError(f"critical_index is {critical}; it must be from 0 to {pairs - 1}")
    checked = as_factors(tail, pairs - critical, "tail")
    below = checked[0] ** (np.arange(critical) / max(critical, 1))
    return np.concatenate([below, checked])


def resonance(wavelengths: Array, factors: Array) -> Array:
    """Factors whose wavelengths T_i λ_i are whole tokens. Source: Resonance RoPE, arXiv 2403.00071."""
    return np.maximum(np.rint(wavelengths * factors), 1.0) / wavelengths


def yarn_attention_factor(scale: float, mscale: float = 1.0) -> float:
    """0.1 · mscale · ln s + 1, multiplied into cos and sin; 1 when s ≤ 1. Source: arXiv 2309.00071, §3.4."""
    return 0.1 * mscale * math.log(scale) + 1.0 if scale > 1.0 else 1.0


def longrope_attention_factor(scale: float, length: float) -> float:
    """√(1 + ln s / ln L), multiplied into cos and sin; 1 when s ≤ 1.

    Raises `ScalingError` when L ≤ 1. Source: microsoft/LongRoPE, policy "su"; transformers
    `_compute_longrope_parameters`.
    """
    if scale <= 1.0:
        return 1.0
    if length <= 1.0:
        raise ScalingError(f"the original window is {length}; it must be greater than 1")
    return math.sqrt(1.0 + math.log(scale) / math.log(length))


def _check_ntk(pairs: int) -> None:
    if pairs < 2:
        raise ScalingError("NTK needs a rotary_dim of at least 4; use pi")
