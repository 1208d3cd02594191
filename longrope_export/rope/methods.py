"""The table of RoPE extension methods: a name, a pure function, a reference; and the record made from one."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from longrope_export.errors import ScalingError, UnsupportedModelError
from longrope_export.rope import formulas
from longrope_export.rope.frequencies import Array, as_factors, check_rotary, crossing, wavelengths
from longrope_export.scaling import RopeScaling

Short = Literal["same", "original"]


@dataclass(frozen=True, eq=False)
class Factors:
    """One set of divisors λ (float64 [rotary_dim // 2]) and the number that multiplies cos and sin."""

    factors: Array
    attention_factor: float = 1.0

    @property
    def is_identity(self) -> bool:
        """Whether this set is RoPE as the model was trained: all λ and the attention factor are 1."""
        return bool((self.factors == 1.0).all()) and self.attention_factor == 1.0


@dataclass(frozen=True, eq=False)
class Setting:
    """What a method is given: the base, the windows L and L', and the wavelengths at present (tokens)."""

    rope_theta: float
    original: int
    target: int
    wavelengths: Array

    @property
    def scale(self) -> float:
        """s = L'/L."""
        return self.target / self.original

    @property
    def pairs(self) -> int:
        """d/2."""
        return len(self.wavelengths)


@dataclass(frozen=True)
class Method:
    """A row of `METHODS`; `short` is what the set for short sequences is unless asked otherwise."""

    name: str
    function: Callable[..., Factors]
    description: str
    reference: str
    short: Short = "same"

    @property
    def options(self) -> dict[str, Any]:
        """Option name → default, from the function's signature."""
        parameters = list(inspect.signature(self.function).parameters.values())[1:]
        return {entry.name: entry.default for entry in parameters}


def _pi(setting: Setting) -> Factors:
    return Factors(formulas.position_interpolation(setting.pairs, setting.scale))


def _ntk(setting: Setting) -> Factors:
    return Factors(formulas.ntk_aware(setting.pairs, setting.scale))


def _dynamic_ntk(setting: Setting, *, factor: float = 1.0, current_length: int | None = None) -> Factors:
    if factor < 1.0:
        raise ScalingError(f"factor is {factor}; dynamic-ntk needs at least 1")
    length = setting.target if current_length is None else current_length
    return Factors(formulas.ntk_aware(setting.pairs, formulas.dynamic_ntk_scale(length, setting.original, factor)))


def _yarn(setting: Setting, *, beta_fast: float = 32.0, beta_slow: float = 1.0, truncate: bool = True) -> Factors:
    kept = formulas.yarn_kept_share(setting.wavelengths, setting.original, beta_fast, beta_slow, truncate)
    return Factors(formulas.frequency_blend(kept, setting.scale), formulas.yarn_attention_factor(setting.scale))


def _yarn_wavelength(
    setting: Setting, *, beta_fast: float = 32.0, beta_slow: float = 1.0, truncate: bool = True
) -> Factors:
    kept = formulas.yarn_kept_share(setting.wavelengths, setting.original, beta_fast, beta_slow, truncate)
    return Factors(formulas.wavelength_blend(kept, setting.scale), formulas.yarn_attention_factor(setting.scale))


def _llama3(setting: Setting, *, low_freq_factor: float = 1.0, high_freq_factor: float = 4.0) -> Factors:
    return Factors(
        formulas.llama3(setting.wavelengths, setting.original, setting.scale, low_freq_factor, high_freq_factor)
    )


def _abf(setting: Setting, *, new_rope_theta: float | None = None) -> Factors:
    if new_rope_theta is None:
        raise ScalingError("abf needs the new base: give new_rope_theta (Llama 2 Long went from 10000 to 500000)")
    if not (math.isfinite(new_rope_theta) and new_rope_theta >= setting.rope_theta):
        raise ScalingError(f"new_rope_theta is {new_rope_theta}; it must be at least {setting.rope_theta:g}")
    return Factors(formulas.base_change(setting.rope_theta, new_rope_theta, setting.pairs))


def _critical_dim(setting: Setting) -> Factors:
    return Factors(formulas.critical_dimension_ntk(setting.wavelengths, setting.original, setting.scale))


def _longrope2(
    setting: Setting, *, critical_index: int | None = None, tail: float | Sequence[float] | None = None
) -> Factors:
    critical = _default_critical(setting) if critical_index is None else critical_index
    if not 0 <= critical < setting.pairs:
        raise ScalingError(f"critical_index is {critical}; it must be from 0 to {setting.pairs - 1}")
    values = np.asarray(setting.scale if tail is None else tail, dtype=np.float64)
    if values.ndim == 0:
        values = np.full(setting.pairs - critical, values)
    if (values < setting.scale).any():
        raise ScalingError(f"longrope2's tail must be at least {setting.scale:g}, the ratio of the windows")
    return Factors(
        formulas.longrope2(setting.pairs, critical, values),
        formulas.longrope_attention_factor(setting.scale, setting.original),
    )


def _default_critical(setting: Setting) -> int:
    position = math.ceil(crossing(setting.wavelengths, setting.original))
    return min(max(position, 0), setting.pairs - 1)


_TABLE = (
    Method("pi", _pi, "divide every frequency by s", "Position Interpolation, arXiv 2306.15595"),
    Method(
        "ntk", _ntk, "NTK-aware: λ = s^(2i/(d−2)), from 1 to s",
        "jquesnelle/yarn, LlamaNTKScaledRotaryEmbedding.py; arXiv 2309.00071, §3.1",
    ),
    Method(
        "dynamic-ntk", _dynamic_ntk, "NTK-aware for the current length; a record holds the set of L'",
        "arXiv 2309.00071, §3.3; transformers _compute_dynamic_ntk_parameters", short="original",
    ),
    Method(
        "yarn", _yarn, "keep fast pairs, divide slow ones by s, blend the frequencies between",
        "YaRN, arXiv 2309.00071, §3.2–3.4; transformers _compute_yarn_parameters",
    ),
    Method(
        "yarn-wavelength", _yarn_wavelength, "YaRN's ramp, blending wavelengths: LongRoPE's search seed",
        "PoSE, revised_yarn; microsoft/LongRoPE, evolution/search.py",
    ),
    Method(
        "llama3", _llama3, "Llama-3.1's by-parts scaling, blended over the number of turns",
        "transformers _compute_llama3_parameters",
    ),
    Method(
        "abf", _abf, "another base: λ = (b'/b)^(2i/d); needs new_rope_theta",
        "Llama 2 Long, arXiv 2309.16039",
    ),
    Method(
        "critical-dim", _critical_dim, "NTK with λ ≥ s from the critical dimension up: λ = s^(i/c)",
        "Liu et al., arXiv 2310.05209; the NTK of LongRoPE2, arXiv 2502.20082",
    ),
    Method(
        "longrope2", _longrope2, "NTK up to the critical index, λ = tail (default s) from it",
        "LongRoPE2, arXiv 2502.20082, algorithm 2",
    ),
)  # fmt: skip
METHODS: dict[str, Method] = {method.name: method for method in _TABLE}


def method_factors(
    name: str,
    *,
    rope_theta: float,
    rotary_dim: int,
    original_max_position_embeddings: int,
    max_position_embeddings: int,
    existing: Factors | None = None,
    attention_factor: float | None = None,
    resonance: bool = False,
    **options: Any,
) -> Factors:
    """The method's own divisors (float64 [rotary_dim // 2]) and attention factor, without `existing`'s.

    `existing` is the scaling that the model has in its window L: methods that look at wavelengths then see
    the stretched ones; `compose` multiplies the two. `attention_factor` replaces the method's; `resonance`
    rounds the resulting wavelengths to whole tokens; `options` are the method's (`METHODS[name].options`).
    Raises `ScalingError` for an unknown method or option, a shrinking window, or values that the method
    cannot use.
    """
    setting = _setting(rope_theta, rotary_dim, original_max_position_embeddings, max_position_embeddings, existing)
    method = _method(name, options)
    try:
        result = method.function(setting, **options)
    except (TypeError, OverflowError, ValueError) as error:
        if isinstance(error, ScalingError):
            raise
        raise ScalingError(f"the options of {name} are not usable: {error}") from None
    factors = formulas.resonance(setting.wavelengths, result.factors) if resonance else result.factors
    attention = result.attention_factor if attention_factor is None else attention_factor
    if not (math.isfinite(attention) and attention > 0.0):
        raise ScalingError(f"attention_factor is {attention}; it must be finite and greater than 0")
    return Factors(as_factors(factors, setting.pairs), float(attention))


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `ScalingError` for an unknown method, or for an option that it does not have."""
    _method(name, {key: value for key, value in options.items() if key != "resonance"})


def compose(existing: npt.NDArray[np.float64], new: npt.NDArray[np.float64]) -> Array:
    """Total divisors of a model that already divides by `existing` and is extended by `new`: their product.

    Divisors multiply because each method divides the frequencies it finds. `new` must have been computed for
    the model's *present* window and wavelengths (`method_factors(existing=…)`), not for its pre-training
    window: a Llama-3.1 model (8,192 × 8 by its llama3 scaling, window 131,072) goes to 524,288 with s = 4,
    and a pair that llama3 has already divided by 8 ends at 32. Both [pairs]; raises `ScalingError` when the
    shapes differ.
    """
    pairs = len(existing)
    return as_factors(existing, pairs, "existing factors") * as_factors(new, pairs, "new factors")


def existing_from_scaling(scaling: RopeScaling | None) -> Factors | None:
    """The one set that a model's present scaling applies, for `method_scaling(existing=…)`; None without one.

    Raises `UnsupportedModelError` when the model switches between different sets: no single frequency table
    exists to compose with.
    """
    if scaling is None:
        return None
    if not scaling.is_static:
        raise UnsupportedModelError(
            "the model already carries longrope factors that differ for short and long sequences "
            f"({scaling.original_max_position_embeddings} → {scaling.max_position_embeddings}); "
            "a closed-form method cannot be put on top: extend the model without them, or use search"
        )
    if scaling.long_start_tokens:
        raise UnsupportedModelError(
            f"the model's scaling leaves the first {scaling.long_start_tokens} tokens un-interpolated; "
            "a closed-form method cannot be put on top: extend the model without it"
        )
    return Factors(np.array(scaling.long_factor, dtype=np.float64), scaling.long_attention_factor)


def method_scaling(
    name: str,
    *,
    rope_theta: float,
    rotary_dim: int,
    original_max_position_embeddings: int,
    max_position_embeddings: int,
    existing: Factors | None = None,
    short: Short | None = None,
    **options: Any,
) -> RopeScaling:
    """The record of a closed-form extension from the model's present window L to L'.

    `short="same"`: one static set for every length. `short="original"`: sequences up to L keep the
    frequencies and attention factor that the model has now. None takes the method's own habit ("original" for
    dynamic-ntk, which leaves short sequences alone, else "same"). With `existing` the divisors and the
    attention factors multiply. Raises `ScalingError` as `method_factors`.
    """
    keywords = {
        "rope_theta": rope_theta,
        "rotary_dim": rotary_dim,
        "original_max_position_embeddings": original_max_position_embeddings,
        "max_position_embeddings": max_position_embeddings,
    }
    new = method_factors(name, **keywords, existing=existing, **options)  # type: ignore[arg-type]
    before = existing or Factors(np.ones(rotary_dim // 2))
    long = Factors(compose(before.factors, new.factors), before.attention_factor * new.attention_factor)
    kind = _short_kind(short, METHODS[name])
    chosen = long if kind == "same" else before
    return RopeScaling(
        **keywords,  # type: ignore[arg-type]
        long_factor=tuple(long.factors),
        short_factor=tuple(chosen.factors),
        long_attention_factor=long.attention_factor,
        short_attention_factor=chosen.attention_factor,
        provenance=_provenance(name, kind, existing, options),
    )


def _setting(rope_theta: float, rotary_dim: int, original: int, target: int, existing: Factors | None) -> Setting:
    check_rotary(rope_theta, rotary_dim)
    if original < 2 or target < original:
        raise ScalingError(f"the window would go from {original} to {target} tokens; give a length above the first")
    present = None if existing is None else existing.factors
    return Setting(rope_theta, original, target, wavelengths(rope_theta, rotary_dim, present))


def _method(name: str, options: Mapping[str, Any]) -> Method:
    if name not in METHODS:
        raise ScalingError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    if unknown := sorted(set(options) - set(method.options)):
        known = ", ".join([*method.options, "resonance"])
        raise ScalingError(f"{name} has no option {', '.join(unknown)}; its options: {known}")
    return method


def _short_kind(short: Short | None, method: Method) -> Short:
    kind = method.short if short is None else short
    if kind not in ("same", "original"):
        raise ScalingError(f"short is {kind!r}; it must be 'same' or 'original'")
    return kind


def _provenance(name: str, short: Short, existing: Factors | None, options: Mapping[str, Any]) -> dict[str, Any]:
    entries: dict[str, Any] = {"method": name, "short": short}
    given = {key: np.asarray(value).tolist() for key, value in sorted(options.items()) if value is not None}
    if given:
        entries["options"] = given
    if existing is not None:
        entries["composed_with"] = {
            "factors": existing.factors.tolist(),
            "attention_factor": existing.attention_factor,
        }
    return entries
