"""The scaling that a config.json says, as the factors it is: longrope and its old names, YaRN, linear, Llama-3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from longrope_export.errors import InputFileError, ScalingError, UnsupportedModelError
from longrope_export.families import FULL, Family, family_for_config, head_dim, rotary_dim
from longrope_export.formats.hf_config import LONGROPE_TYPES, count, rope_by_layer_type, text_config
from longrope_export.formats.hf_scaling import longrope_scaling, own_record
from longrope_export.rope.hf_types import factors_from_rope_parameters
from longrope_export.scaling import RopeScaling

ORIGINAL, WINDOW = "original_max_position_embeddings", "max_position_embeddings"
# Names of model code that does not follow transformers': Phi-3-small, and MiniCPM 3, which rotates a part of its own.
_NAMES = {"rope_embedding_base": "rope_theta", "qk_rope_head_dim": "head_dim"}
_MSCALES = {"long_mscale": "long_attention_factor", "short_mscale": "short_attention_factor"}


def scaling_from_any_config(config: Mapping[str, Any], *, original: int | None, window: int | None) -> RopeScaling:
    """The record that a parsed config.json expresses; `original` and `window` stand in for what it does not say.

    A static type (yarn, linear, llama3) has one set for every length, dynamic NTK the set of `window`. Raises
    `InputFileError` for a model without rope scaling or with malformed values, `UnsupportedModelError` for a
    type that is no set of factors, `ScalingError` for values that are no valid record.
    """
    own = own_record(config)
    if own is not None:
        return own
    values = _with_known_names(text_config(config))
    if original is not None:
        values[ORIGINAL] = original  # at the top level, where transformers looks first
    found = longrope_scaling(values if window is None else {**values, WINDOW: window})
    return _static(values, window) if found is None else _with_mscales(values, found)


def _with_known_names(text: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(text)
    for theirs, ours in _NAMES.items():
        if theirs in text and ours not in text:
            values[ours] = text[theirs]
    return values


def _with_mscales(values: Mapping[str, Any], scaling: RopeScaling) -> RopeScaling:
    """Phi-3-small and Phi-3.5-MoE name an attention factor for each regime; vLLM applies them for every model."""
    parameters = values.get("rope_scaling") or values.get("rope_parameters") or {}
    parameters = parameters.get(FULL, parameters)
    changed: dict[str, Any] = {}
    for theirs, ours in _MSCALES.items():
        value = parameters.get(theirs)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise ScalingError(f"config.json: {theirs} is {str(value)[:60]!r}; it must be a number")
            changed[ours] = value
    return replace(scaling, **changed, provenance={"source": f"config.json {parameters.get('rope_type', 'su')}"})


def _static(values: Mapping[str, Any], target: int | None) -> RopeScaling:
    """A type that is one set for every length."""
    family = _family(values)
    filled = {**family.defaults, **{key: value for key, value in values.items() if value is not None}}
    ropes, _ = rope_by_layer_type(filled, family)
    rope = ropes[FULL]
    if rope.rope_type == "default":
        raise InputFileError("config.json says no rope scaling; there is nothing to import")
    for key in ("hidden_size", "num_attention_heads"):
        count(filled, key)
    dimension = rotary_dim(family, head_dim(family, filled), rope.partial_rotary_factor)
    length = count(filled, WINDOW)
    original, window = _windows(rope.parameters, filled, length)
    window = window if target is None else target
    found = factors_from_rope_parameters(
        rope.parameters, rotary_dim=dimension, max_position_embeddings=length,
        length=window if rope.rope_type == "dynamic" else None,
    )  # fmt: skip
    factors = tuple(found.factors.tolist())
    return RopeScaling(
        rope_theta=rope.rope_theta, rotary_dim=dimension,
        original_max_position_embeddings=original, max_position_embeddings=window,
        long_factor=factors, short_factor=() if rope.rope_type == "dynamic" else factors,
        long_attention_factor=found.attention_factor, short_attention_factor=found.attention_factor,
        provenance={"source": f"config.json {rope.rope_type}"},
    )  # fmt: skip


def _windows(parameters: Mapping[str, Any], values: Mapping[str, Any], length: int) -> tuple[int, int]:
    """L and L': the config's, else L' = factor · L, because many configs leave the window as it was."""
    if parameters["rope_type"] in LONGROPE_TYPES:
        raise InputFileError("config.json: longrope without its lists of factors")
    known = values.get(ORIGINAL) or parameters.get(ORIGINAL)
    original = count({ORIGINAL: known}, ORIGINAL) if known is not None else length
    factor = parameters.get("factor")
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor < 2**31:
        return original, max(original, length)
    return original, max(original, length) if length > original else min(round(original * factor), 2**31 - 1)


def _family(values: Mapping[str, Any]) -> Family:
    try:
        return family_for_config(values.get("model_type"))
    except UnsupportedModelError:
        return Family(
            name=str(values.get("model_type"))[:60], model_types=(), architectures=(), gguf_architectures=(),
            pair_layout="NEOX", defaults={"rope_theta": 10000.0}, partial_rotary=True,
        )  # fmt: skip
