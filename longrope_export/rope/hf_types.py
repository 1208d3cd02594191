"""Rope types of Hugging Face configs (`rope_parameters`, formerly `rope_scaling`) turned into factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longrope_export.errors import ScalingError, UnsupportedModelError
from longrope_export.rope import formulas
from longrope_export.rope.frequencies import as_factors, wavelengths
from longrope_export.rope.methods import Factors

# Written by configs that predate the present names.
ALIASES = {"su": "longrope", "none": "default"}

# Known and not expressible as divisors of one frequency table shared by all pairs.
REFUSED = {
    "proportional": "it switches pairs off altogether, which no divisor expresses",
    "axial": "it rotates by two-dimensional image positions",
}

# `finetuned` is a note of YaRN's authors; mrope_* choose position axes, which are all equal for text.
_COMMON = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "finetuned",
    "mrope_section",
    "mrope_interleaved",
}


@dataclass(frozen=True)
class _Model:
    """The model's numbers that a rope type may need; `length` None: transformers' state after loading."""

    rotary_dim: int
    window: int
    length: int | None

    @property
    def pairs(self) -> int:
        return self.rotary_dim // 2


@dataclass(frozen=True)
class _RopeType:
    convert: Callable[[Mapping[str, Any], _Model], Factors]
    keys: frozenset[str]


def factors_from_rope_parameters(
    parameters: Mapping[str, Any] | None,
    *,
    rotary_dim: int,
    max_position_embeddings: int,
    length: int | None = None,
) -> Factors:
    """The divisors and the attention factor that transformers applies for these (flat) `rope_parameters`.

    `length` is the current sequence length, as transformers' `seq_len`: it chooses longrope's set (short up
    to `original_max_position_embeddings`, long above) and dynamic NTK's base; None means a sequence inside
    the original window. `max_position_embeddings` is the config's. Raises `UnsupportedModelError` for a rope
    type, a nesting or a key that cannot be turned into factors, each by name, and `ScalingError` for values
    that are not usable. Source: transformers, modeling_rope_utils.py (`ROPE_INIT_FUNCTIONS`,
    `standardize_rope_params`).
    """
    values = dict(parameters or {})
    rope_type = rope_type_of(values)
    entry = HANDLED[rope_type]
    if unknown := sorted(key for key, value in values.items() if key not in entry.keys | _COMMON and value is not None):
        raise UnsupportedModelError(
            f"rope type {rope_type!r} has the keys {', '.join(map(str, unknown))[:200]}, not known here"
        )
    return entry.convert(values, _Model(rotary_dim, max_position_embeddings, length))


def rope_type_of(parameters: Mapping[str, Any] | None) -> str:
    """The rope type's present name ("default" when none is given).

    Raises `UnsupportedModelError` when it is refused, unknown, or nested by layer type.
    """
    values = parameters or {}
    if nested := [key for key, value in values.items() if isinstance(value, Mapping)]:
        raise UnsupportedModelError(
            f"rope_parameters are nested ({', '.join(map(str, nested))[:200]}); read one layer type's"
        )
    name = values.get("rope_type") or values.get("type") or "default"
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name == "mrope" and "mrope_section" in values:
        name = "default"  # sections choose a pair's position axis; the frequencies are plain
    if not isinstance(name, str) or name not in HANDLED:
        reason = REFUSED.get(name, "this version does not know it") if isinstance(name, str) else "it is not a name"
        raise UnsupportedModelError(f"rope type {str(name)[:60]!r} cannot be turned into factors: {reason}")
    return name


def _default(values: Mapping[str, Any], model: _Model) -> Factors:
    return Factors(np.ones(model.pairs))


def _linear(values: Mapping[str, Any], model: _Model) -> Factors:
    return Factors(formulas.position_interpolation(model.pairs, _number(values, "factor")))


def _dynamic(values: Mapping[str, Any], model: _Model) -> Factors:
    # Exact for the length asked: up to the window this type changes nothing, beyond it the base follows the
    # length.
    factor = _number(values, "factor")
    scale = formulas.dynamic_ntk_scale(model.length or model.window, model.window, factor)
    return Factors(formulas.ntk_aware(model.pairs, scale) if scale > 1.0 else np.ones(model.pairs))


def _yarn(values: Mapping[str, Any], model: _Model) -> Factors:
    original = _original(values, model)
    factor = model.window / original if values.get("factor") is None else _number(values, "factor")
    truncate = values.get("truncate")
    kept = formulas.yarn_kept_share(
        wavelengths(_number(values, "rope_theta"), model.rotary_dim),
        original,
        # transformers reads a 0 or null beta as "not given".
        _number(values, "beta_fast", 32.0) if values.get("beta_fast") else 32.0,
        _number(values, "beta_slow", 1.0) if values.get("beta_slow") else 1.0,
        True if truncate is None else bool(truncate),
    )
    return Factors(formulas.frequency_blend(kept, factor), _yarn_attention(values, factor))


def _yarn_attention(values: Mapping[str, Any], factor: float) -> float:
    if values.get("attention_factor") is not None:
        return _number(values, "attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        over = formulas.yarn_attention_factor(factor, _number(values, "mscale"))
        return over / formulas.yarn_attention_factor(factor, _number(values, "mscale_all_dim"))
    return formulas.yarn_attention_factor(factor)


def _llama3(values: Mapping[str, Any], model: _Model) -> Factors:
    periods = wavelengths(_number(values, "rope_theta"), model.rotary_dim)
    low, high = _number(values, "low_freq_factor"), _number(values, "high_freq_factor")
    return Factors(formulas.llama3(periods, _original(values, model), _number(values, "factor"), low, high))


def _longrope(values: Mapping[str, Any], model: _Model) -> Factors:
    original = _original(values, model)
    long = model.length is not None and model.length > original
    name = "long_factor" if long else "short_factor"
    if not isinstance(values.get(name), (list, tuple)):
        raise ScalingError(f"rope_parameters has no list {name}; rope type 'longrope' needs it")
    factor = model.window / original if values.get("factor") is None else _number(values, "factor")
    attention = (
        formulas.longrope_attention_factor(factor, original)
        if values.get("attention_factor") is None
        else _number(values, "attention_factor")
    )
    _refuse_other_mscale(values, attention)
    return Factors(as_factors(values[name], model.pairs, name), attention)


def _refuse_other_mscale(values: Mapping[str, Any], attention: float) -> None:
    # transformers ignores these two keys (phimoe apart), vLLM and SGLang multiply by them.
    for name in ("short_mscale", "long_mscale"):
        given = values.get(name)
        if given is not None and not math.isclose(_number(values, name), attention, rel_tol=1e-6):
            raise UnsupportedModelError(
                f"longrope with {name} = {given} beside the attention factor {attention:.6g}: "
                "runtimes disagree on it; remove one of the two"
            )


def _original(values: Mapping[str, Any], model: _Model) -> float:
    return _number(values, "original_max_position_embeddings", float(model.window))


def _number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = values.get(name)
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < 1e18:
        raise ScalingError(f"rope_parameters has {name} = {str(value)[:60]}; it must be a number greater than 0")
    return float(value)


_LENGTH = {"factor", "original_max_position_embeddings"}
HANDLED: dict[str, _RopeType] = {
    "default": _RopeType(_default, frozenset()),
    "linear": _RopeType(_linear, frozenset({"factor"})),
    "dynamic": _RopeType(_dynamic, frozenset({"factor"})),
    "yarn": _RopeType(
        _yarn,
        frozenset(_LENGTH | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "llama3": _RopeType(_llama3, frozenset(_LENGTH | {"low_freq_factor", "high_freq_factor"})),
    "longrope": _RopeType(
        _longrope,
        frozenset(_LENGTH | {"attention_factor", "short_factor", "long_factor", "short_mscale", "long_mscale"}),
    ),
}
