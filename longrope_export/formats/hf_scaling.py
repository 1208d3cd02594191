"""The `RopeScaling` that a config.json carries: our own record, or longrope's rope_parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from longrope_export.errors import InputFileError, ScalingError, UnsupportedModelError
from longrope_export.families import FULL, SLIDING, Family, family_for_config, head_dim, rotary_dim
from longrope_export.formats.hf_config import (
    LONGROPE_TYPES,
    HfRope,
    count,
    rope_by_layer_type,
    rope_type,
    text_config,
    with_defaults,
)
from longrope_export.scaling import RopeScaling, short_repr

RECORD_KEY = "longrope_export"
# What a format can express of a record; n̂, the short attention factor and further sets have no place in it.
SHARED_FIELDS = (
    "rope_theta", "rotary_dim", "original_max_position_embeddings", "max_position_embeddings", "long_factor",
    "short_factor", "long_attention_factor",
)  # fmt: skip


def scaling_from_config(config: Mapping[str, Any]) -> RopeScaling | None:
    """The record in a parsed config.json; None when it carries no longrope scaling.

    Our own key `longrope_export` gives the whole record and must agree, in float32 bits, with what
    rope_parameters say. Without it the record is built from longrope's rope_parameters as transformers
    computes them: an absent attention_factor becomes √(1 + ln s/ln L), with s the explicit `factor` or
    L'/L. Raises `InputFileError` when the values are malformed or contradict one another, `ScalingError`
    when they are no valid record.
    """
    own = own_record(config)
    found = longrope_scaling(config)
    if own is None:
        return found
    if found is None:
        raise InputFileError(
            f"config.json has the record {RECORD_KEY}, but its rope_parameters are not longrope; "
            "it was edited afterwards: write the folder again or remove the key"
        )
    check_agreement(own, found, f"config.json: the key {RECORD_KEY}", "rope_parameters")
    return own


def own_record(config: Mapping[str, Any]) -> RopeScaling | None:
    """Our record in the config, unchecked against rope_parameters; raises `ScalingError` when it is not
    valid.
    """
    values = config.get(RECORD_KEY)
    if values is None:
        values = text_config(config).get(RECORD_KEY)
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise InputFileError(f"config.json: {RECORD_KEY} is {short_repr(values)}; it must be an object")
    return RopeScaling.from_dict(values)


def check_agreement(left: RopeScaling, right: RopeScaling, left_name: str, right_name: str) -> None:
    """Raise `InputFileError` naming the fields in which two sources of one record differ in bits."""
    if names := [name for name in SHARED_FIELDS if getattr(left, name) != getattr(right, name)]:
        raise InputFileError(
            f"{left_name} and {right_name} disagree in {', '.join(names)}; write the file again from one record"
        )


def longrope_scaling(config: Mapping[str, Any]) -> RopeScaling | None:
    """The record that longrope's rope_parameters express, whatever our own key says; None for other rope
    types.
    """
    text = text_config(config)
    family = _family(text)
    values = with_defaults(text, family)
    if not (values.get("rope_parameters") or values.get("rope_scaling")):
        return None
    ropes, _ = rope_by_layer_type(values, family)
    rope = ropes[FULL]
    if SLIDING in ropes and ropes[SLIDING].rope_type in LONGROPE_TYPES:
        raise UnsupportedModelError("config.json: longrope on sliding-window layers is not supported")
    if rope.rope_type not in LONGROPE_TYPES:
        return None
    _check_single_source(values)
    return _record(values, family, rope)


def _family(text: Mapping[str, Any]) -> Family:
    """The model's row; unknown model types are read by the rules that most families follow."""
    try:
        return family_for_config(text.get("model_type"))
    except UnsupportedModelError:
        return Family(
            name=short_repr(text.get("model_type")),
            model_types=(), architectures=(), gguf_architectures=(), pair_layout="NEOX",
            defaults={"rope_theta": 10000.0}, partial_rotary=True,
        )  # fmt: skip


def _check_single_source(values: Mapping[str, Any]) -> None:
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if not (isinstance(new, Mapping) and isinstance(old, Mapping) and new and old):
        return
    new = new.get(FULL, new)
    keys = ("long_factor", "short_factor", "attention_factor", "factor")
    if rope_type(new) not in LONGROPE_TYPES or any(new.get(key) != old.get(key) for key in keys):
        raise InputFileError("config.json: rope_parameters and rope_scaling differ; remove the one that is wrong")


def _record(values: Mapping[str, Any], family: Family, rope: HfRope) -> RopeScaling:
    if not values.get("head_dim"):
        count(values, "hidden_size")
        count(values, "num_attention_heads")
    else:
        count(values, "head_dim")
    original, window = (
        count(rope.parameters, "original_max_position_embeddings"),
        count(values, "max_position_embeddings"),
    )
    attention = _attention_factor(rope.parameters, original, window)
    scaling = RopeScaling(
        rope_theta=rope.rope_theta,
        rotary_dim=rotary_dim(family, head_dim(family, values), rope.partial_rotary_factor),
        original_max_position_embeddings=original,
        max_position_embeddings=window,
        long_factor=_numbers(rope.parameters, "long_factor"),
        short_factor=_numbers(rope.parameters, "short_factor"),
        long_attention_factor=attention,
        short_attention_factor=attention,
    )
    return replace(scaling, provenance={"source": "config.json rope_parameters"})


def _numbers(parameters: Mapping[str, Any], name: str) -> tuple[float, ...]:
    value = parameters.get(name)
    if not isinstance(value, list) or not value:
        raise InputFileError(f"config.json: {name} is {short_repr(value)}; longrope needs a list of numbers")
    for index, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            raise InputFileError(f"config.json: {name}[{index}] is {short_repr(item)}; it must be a number")
    return tuple(value)


def _attention_factor(parameters: Mapping[str, Any], original: int, window: int) -> float:
    factor = window / original if parameters.get("factor") is None else _number(parameters, "factor")
    if parameters.get("attention_factor") is not None:
        return _number(parameters, "attention_factor")
    from longrope_export.rope.formulas import longrope_attention_factor  # numpy, which a patch can do without

    return longrope_attention_factor(factor, original)


def _number(values: Mapping[str, Any], name: str) -> float:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30 or math.isnan(value):
        raise ScalingError(f"config.json: {name} is {short_repr(value)}; it must be a finite number")
    return float(value)
