"""A model's config.json, and the same with a `RopeScaling` in it: for transformers 4 and 5, vLLM and
SGLang.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longrope_export.converters.lossy import undone_losses
from longrope_export.errors import ScalingError, UnsupportedModelError
from longrope_export.families import FULL, SLIDING, Family, family_for_config, head_dim, rotary_dim
from longrope_export.formats.hf_config import LONGROPE_TYPES, HfRope, config_values, rope_by_layer_type, text_config
from longrope_export.formats.hf_scaling import RECORD_KEY
from longrope_export.rope.formulas import longrope_attention_factor
from longrope_export.rope.hf_types import factors_from_rope_parameters
from longrope_export.rope.methods import Factors
from longrope_export.scaling import RopeScaling, to_float32

_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class LanguageModel:
    """What config.json says of the language model: `values` with the family's defaults, and its RoPE by layer
    type.
    """

    family: Family
    values: Mapping[str, Any]
    ropes: Mapping[str, HfRope]

    @property
    def rope(self) -> HfRope:
        """RoPE of the layers that attend to everything."""
        return self.ropes[FULL]

    @property
    def head_dim(self) -> int:
        """Values per attention head."""
        return head_dim(self.family, self.values)

    @property
    def rotary_dim(self) -> int:
        """Rotated values per head."""
        return rotary_dim(self.family, self.head_dim, self.rope.partial_rotary_factor)

    def check_record(self, scaling: RopeScaling) -> None:
        """Raise `ScalingError` when the record was made for another number of pairs or another base."""
        if self.rotary_dim != scaling.rotary_dim:
            raise ScalingError(
                f"the record has {scaling.rotary_dim // 2} factors, the model needs {self.rotary_dim // 2}; "
                "it was made for another model"
            )
        if to_float32(self.rope.rope_theta) != scaling.rope_theta:
            raise ScalingError(
                f"the record is for rope_theta {scaling.rope_theta:g}, the model has "
                f"{self.rope.rope_theta:g}; it was made for another model"
            )

    def window_losses(self, scaling: RopeScaling) -> list[str]:
        """One sentence when the record's L is neither the model's window nor the one it was extended from."""
        window = self.values["max_position_embeddings"]
        if scaling.original_max_position_embeddings in (window, self.rope.parameters.get(_ORIGINAL)):
            return []
        return [f"the record extends a window of {scaling.original_max_position_embeddings}, the model has {window}"]

    def static_factors(self) -> Factors | None:
        """Divisors and attention factor of a static rope type (llama3, yarn, linear); None for default and
        longrope.

        Raises `UnsupportedModelError` for dynamic NTK, which is another set at every length.
        """
        if self.rope.rope_type in ("default", *LONGROPE_TYPES):
            return None
        if self.rope.rope_type == "dynamic":
            raise UnsupportedModelError("dynamic NTK has other factors at every length; remove it from config.json")
        return factors_from_rope_parameters(
            self.rope.parameters,
            rotary_dim=self.rotary_dim,
            max_position_embeddings=self.values["max_position_embeddings"],
        )

    def composition_losses(self, scaling: RopeScaling) -> list[str]:
        """One sentence when the record does not hold the factors that the model has already."""
        static = self.static_factors()
        return [] if static is None else undone_losses(static.factors, scaling, self.rope.rope_type)


def language_model(config: Mapping[str, Any]) -> LanguageModel:
    """Read a parsed config.json; raises `UnsupportedModelError` for an unknown family, `InputFileError` for
    bad values.
    """
    family = family_for_config(text_config(config).get("model_type"))
    values = config_values(config, family)
    ropes, _ = rope_by_layer_type(values, family)
    return LanguageModel(family, values, ropes)


def extended_config(config: Mapping[str, Any], scaling: RopeScaling) -> dict[str, Any]:
    """Copy of a parsed config.json that carries `scaling`.

    `rope_parameters` and an equal `rope_scaling` stand beside a top-level `rope_theta`: transformers 4, vLLM
    and mlx-lm read the old names, and transformers 5 takes theta 10,000 when only the old names are there.
    Raises `UnsupportedModelError` for an unknown family and `ScalingError` when the record belongs to another
    model.
    """
    model = language_model(config)
    model.check_record(scaling)
    changed = dict(config["text_config"] if config.get("text_config") else config)
    changed.update(_rope_keys(model, scaling))
    changed.update(max_position_embeddings=scaling.max_position_embeddings, head_dim=model.head_dim, use_cache=True)
    # transformers lets a top-level value override the one beside the factors; vLLM serves no more than it.
    changed.pop(_ORIGINAL, None)
    if model.family.top_level_original:
        changed[_ORIGINAL] = scaling.original_max_position_embeddings
    whole = {**config, "text_config": changed} if config.get("text_config") else changed
    return {**whole, RECORD_KEY: scaling.to_dict()}


def _rope_keys(model: LanguageModel, scaling: RopeScaling) -> dict[str, Any]:
    rope = longrope_parameters(scaling)
    if model.family.partial_rotary:
        rope["partial_rotary_factor"] = model.rope.partial_rotary_factor
    keys = {"rope_parameters": rope, "rope_scaling": dict(rope), "rope_theta": scaling.rope_theta}
    if model.family.nested_rope:
        # transformers merges a flat rope_scaling into full_attention, and ignores a flat rope_parameters.
        keys["rope_parameters"] = {FULL: rope, SLIDING: dict(model.ropes[SLIDING].parameters)}
        keys["rope_local_base_freq"] = model.ropes[SLIDING].rope_theta
    return keys


def longrope_parameters(scaling: RopeScaling) -> dict[str, Any]:
    """transformers' `rope_parameters` for the record; every value explicit, because runtimes default
    differently.
    """
    values: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": scaling.rope_theta,
        "factor": scaling.factor,
        _ORIGINAL: scaling.original_max_position_embeddings,
        "attention_factor": scaling.long_attention_factor,
        "long_factor": list(scaling.long_factor),
        "short_factor": list(scaling.short_factor),
    }
    formula = longrope_attention_factor(scaling.factor, scaling.original_max_position_embeddings)
    if {scaling.long_attention_factor, scaling.short_attention_factor} != {to_float32(formula)}:
        # vLLM and SGLang read these two, and the formula otherwise; transformers warns and ignores them.
        values["long_mscale"] = scaling.long_attention_factor
        values["short_mscale"] = scaling.short_attention_factor
    return values


def json_text(values: Mapping[str, Any]) -> str:
    """`values` as an indented JSON document with a final newline."""
    return json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
