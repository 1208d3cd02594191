"""Profiles of a model folder's config.json: one that most runtimes read, and others where one folder cannot serve all.

The default is read by transformers 4 and 5, vLLM and SGLang. Which rule each of the others follows was read in its source
(ExLlamaV2 da07fac, mlx-lm d78bf58e, SGLang 0b1fd02d; tests hold transcriptions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from longrope_export.converters.hf_config import extended_config, language_model
from longrope_export.converters.lossy import one_set_record
from longrope_export.errors import UnsupportedModelError
from longrope_export.families import Family
from longrope_export.rope.formulas import longrope_attention_factor
from longrope_export.scaling import RopeScaling, to_float32

DEFAULT = "default"
_ORIGINAL = "original_max_position_embeddings"
Config = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """`edit` changes the default's config.json (the language model's part) in place, `record` the record before;
    `losses` are sentences about what the runtime will not apply. `families` None: all of them.
    """

    runtime: str
    edit: Callable[[Config, RopeScaling], None]
    losses: Callable[[RopeScaling], list[str]]
    record: Callable[[RopeScaling], RopeScaling] = lambda scaling: scaling
    families: tuple[str, ...] | None = None


def profile_config(
    config: Mapping[str, Any], scaling: RopeScaling, name: str = DEFAULT
) -> tuple[Config, RopeScaling, list[str]]:
    """Copy of a parsed config.json for the profile `name`, the record that it then carries, and the runtime's losses.

    Raises `UnsupportedModelError` for an unknown profile or one that the model's family has no use for, and what
    `extended_config` raises.
    """
    if name == DEFAULT:
        return extended_config(config, scaling), scaling, []
    profile = PROFILES.get(name)
    if profile is None:
        raise UnsupportedModelError(f"there is no profile {name!r}; there are: {', '.join((DEFAULT, *PROFILES))}")
    family = language_model(config).family
    if profile.families is not None and family.name not in profile.families:
        raise UnsupportedModelError(
            f"the profile {name} is for {', '.join(profile.families)}: {profile.runtime} reads the default of {family.name}"
        )
    written = profile.record(scaling)
    changed = extended_config(config, written)
    profile.edit(changed["text_config"] if changed.get("text_config") else changed, written)
    return changed, written, profile.losses(scaling)


def default_misreaders(family: Family, scaling: RopeScaling) -> list[str]:
    """Who reads the default profile otherwise than transformers does, one sentence each, and the profile for it."""
    window, notes = scaling.original_max_position_embeddings, []
    if scaling.long_factor != scaling.short_factor:
        notes.append(f"vLLM uses one set for the whole server: the long one if --max-model-len exceeds {window}")
        notes.append(
            f"SGLang switches with the longest request of its batch, and caches that cross {window} go wrong: "
            "one set for every length (--for sglang) does not switch"
        )
        notes.append("mlx-lm uses the long factors at every length")
    if family.name == "phi3":
        notes.append("mlx-lm refuses a phi3 without the key `type` (--for mlx-phi3)")
    elif not family.nested_rope:
        notes.append(f"ExLlamaV2 does not find {_ORIGINAL} and stops (--for exllamav2)")
    if not _by_formula(scaling):
        notes.append(
            f"mlx-lm and ExLlama ignore the attention factor {scaling.long_attention_factor:.6g} "
            f"and take {_formula(scaling):.6g}"
        )
    return notes


def _formula(scaling: RopeScaling) -> float:
    return to_float32(longrope_attention_factor(scaling.factor, scaling.original_max_position_embeddings))


def _by_formula(scaling: RopeScaling) -> bool:
    return scaling.long_attention_factor == _formula(scaling)


def _attention_loss(runtime: str, scaling: RopeScaling) -> list[str]:
    if _by_formula(scaling):
        return []
    return [
        f"{runtime} will take the attention factor {_formula(scaling):.6g}, not {scaling.long_attention_factor:.6g}"
    ]


def _exllama_losses(scaling: RopeScaling) -> list[str]:
    found = _attention_loss("ExLlamaV2", scaling)
    if scaling.short_attention_factor != 1.0:
        found.append(
            f"ExLlamaV2 will take the attention factor 1 in short contexts, not {scaling.short_attention_factor:.6g}"
        )
    return found


def _mlx_losses(scaling: RopeScaling) -> list[str]:
    short = scaling.long_factor != scaling.short_factor
    found = ["mlx-lm will use the long factors for short prompts too"] if short else []
    return found + _attention_loss("mlx-lm", scaling)


def _sglang_losses(scaling: RopeScaling) -> list[str]:
    short = scaling.long_factor != scaling.short_factor
    return ["the folder has the long factors only, for short prompts too"] if short else []


def _original_at_the_top(config: Config, scaling: RopeScaling) -> None:
    config[_ORIGINAL] = scaling.original_max_position_embeddings


def _old_type(config: Config, scaling: RopeScaling) -> None:
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")


def _unchanged(config: Config, scaling: RopeScaling) -> None:
    pass


PROFILES: Mapping[str, Profile] = MappingProxyType(
    {
        # vLLM then serves no more than the original window unless --max-model-len says otherwise
        "exllamav2": Profile("ExLlamaV2", _original_at_the_top, _exllama_losses),
        "mlx-phi3": Profile("mlx-lm", _old_type, _mlx_losses, families=("phi3",)),
        "sglang": Profile("SGLang", _unchanged, _sglang_losses, record=one_set_record),
    }
)
