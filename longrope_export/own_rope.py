"""The rotation of a model that carries a rope type of its own which is alike at every length: linear, YaRN, Llama-3."""

from __future__ import annotations

from typing import Any

import torch

from longrope_export.families import FULL
from longrope_export.rope.hf_types import factors_from_rope_parameters, rope_type_of
from longrope_export.rotary import Angles, RotarySet, family_of, inverse_frequencies_of, rope_theta_of, rotary_dim_of

# Plain RoPE scales nothing; the other two change with the length, and longrope has a record.
_NOT_STATIC = ("default", "dynamic", "longrope")


def own_set(model: Any, angles: Angles) -> RotarySet | None:
    """What the config of a model in memory asks for, of full attention; None unless its rope type is static.

    `angles="exact"` computes the frequencies in float64; `"float32"` takes them from transformers, bit for bit. Raises
    `UnsupportedModelError` for a rope type or a model type that is not known here, `ScalingError` for unusable values.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    flat = parameters.get(FULL, parameters)
    if not flat or rope_type_of(flat) in _NOT_STATIC:
        return None
    if angles == "float32":
        return _of_transformers(model, config, rope_type_of(flat))
    window = config.max_position_embeddings
    found = factors_from_rope_parameters(flat, rotary_dim=rotary_dim_of(model), max_position_embeddings=window)
    frequencies = inverse_frequencies_of(torch.from_numpy(found.factors), rope_theta_of(model), angles)
    return RotarySet(frequencies, found.attention_factor, 0)


def _of_transformers(model: Any, config: Any, rope_type: str) -> RotarySet:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    layer_type = {"layer_type": FULL} if family_of(model).nested_rope else {}
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), **layer_type)
    return RotarySet(frequencies, float(attention_factor), 0)
