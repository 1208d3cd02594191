"""Reading config.json safely, and finding the RoPE parameters in it as transformers 5 does."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.families import FULL, SLIDING, Family
from longrope_export.scaling import short_repr

MAX_CONFIG_BYTES = 1 << 24
MAX_COUNT = 2**31 - 1
MAX_LAYERS = 1 << 16
LONGROPE_TYPES = ("longrope", "su")
_WITH_ORIGINAL = (*LONGROPE_TYPES, "llama3", "yarn")


@dataclass(frozen=True)
class HfRope:
    """RoPE of one layer type: its type, its base θ, and all parameters under transformers' names."""

    rope_type: str
    rope_theta: float
    partial_rotary_factor: float
    parameters: Mapping[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; duplicate keys, NaN, infinities and lone surrogates are refused.

    Raises `InputFileError` when the file is missing, over 16 MB, or not such an object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("it has a duplicate key")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"it holds {constant}")

    def finite(text: str) -> float:
        return float(text) if math.isfinite(float(text)) else refuse(text[:40])

    if not path.is_file():
        raise InputFileError(f"{path} does not exist or is not a file")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise InputFileError(f"{path} has over {MAX_CONFIG_BYTES:,} bytes; it is not a model's configuration")
        text = path.read_bytes().decode()
        values = json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
        json.dumps(values, ensure_ascii=False).encode()  # a lone surrogate could be read, but never printed
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path} is not valid JSON: {str(error)[:120]}") from None
    if not isinstance(values, dict):
        raise InputFileError(f"{path} must hold a JSON object")
    return values


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's part of a config: `text_config` where there is one, else the config itself."""
    inner = config.get("text_config")
    if inner is None:
        return dict(config)
    if not isinstance(inner, Mapping):
        raise InputFileError("config.json: text_config must be an object")
    return {"model_type": config.get("model_type")} | dict(inner)


def with_defaults(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The language model's config with the family's defaults for absent keys.

    As in transformers null is no absent key: a null `sliding_window` means none, a null `num_key_value_heads` as many
    as there are heads.
    """
    values = {**family.defaults, **text_config(config)}
    if values.get("rope_theta") is None:
        values["rope_theta"] = family.defaults["rope_theta"]
    return values


def config_values(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """`with_defaults`, with the sizes checked that others divide by or count up to."""
    values = with_defaults(config, family)
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "max_position_embeddings"):
        count(values, key)
    for key in ("head_dim", "max_window_layers", "sliding_window_pattern"):
        if values.get(key) is not None:
            count(values, key)
    if values["num_hidden_layers"] > MAX_LAYERS:
        raise InputFileError(
            f"config.json: num_hidden_layers is {values['num_hidden_layers']}; at most {MAX_LAYERS} are read"
        )
    return values


def count(config: Mapping[str, Any], key: str) -> int:
    """A whole number of config.json from 1 to 2^31 − 1; raises `InputFileError` for anything else."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
        raise InputFileError(
            f"config.json: {key} is {short_repr(value)}; it must be a whole number from 1 to {MAX_COUNT}"
        )
    return value


def positive(values: Mapping[str, Any], key: str) -> float:
    """A finite number above 0; raises `InputFileError` for anything else."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputFileError(f"config.json: {key} is {short_repr(value)}; it must be a finite number above 0")
    try:
        return float(value)
    except OverflowError:
        raise InputFileError(f"config.json: {key} is too large") from None


def rope_by_layer_type(config: Mapping[str, Any], family: Family) -> tuple[dict[str, HfRope], list[str]]:
    """What transformers will compute, by layer type, and warnings about what it does silently.

    A family with one RoPE for all layers has only the key `full_attention`. `config` must hold the family's
    defaults. Raises `InputFileError` for values of wrong type. Source: transformers 5.23
    `modeling_rope_utils.py`, convert_rope_params_to_dict and standardize_rope_params.
    """
    warnings: list[str] = []
    parameters, scaling = _object(config, "rope_parameters"), _object(config, "rope_scaling")
    if family.nested_rope:
        return _nested(config, family, parameters, scaling, warnings), warnings
    if parameters and scaling:
        warnings += differences(config, parameters, scaling)
    chosen = dict(scaling or parameters or {})
    if isinstance(chosen.get(FULL), Mapping):
        raise InputFileError(
            f"config.json: the rope parameters are nested by layer type, but {family.name} has one RoPE"
        )
    chosen.setdefault("rope_theta", config["rope_theta"])
    chosen.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    _fill_original(config, chosen, warnings)
    return {FULL: _rope(chosen)}, warnings


def _object(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = config.get(key)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InputFileError(f"config.json: {key} is {short_repr(value)}; it must be an object")
    return dict(value)


def differences(config: Mapping[str, Any], parameters: Mapping[str, Any], scaling: Mapping[str, Any]) -> list[str]:
    """Warnings where rope_scaling overrides a different rope_parameters."""
    theta = config.get("rope_theta")
    left, right = (
        {"rope_theta": theta} | {k: v for k, v in side.items() if k != "type"} for side in (parameters, scaling)
    )
    left["rope_type"], right["rope_type"] = rope_type(parameters), rope_type(scaling)
    names = sorted(name for name in set(left) | set(right) if left.get(name) != right.get(name))
    return (
        [f"rope_scaling and rope_parameters differ in {', '.join(names)}; transformers uses rope_scaling"]
        if names
        else []
    )


def rope_type(values: Mapping[str, Any]) -> str:
    """`rope_type`, or its old name `type`; raises `InputFileError` when it is no string."""
    value = values.get("rope_type", values.get("type", "default"))
    if not isinstance(value, str):
        raise InputFileError(f"config.json: rope_type is {short_repr(value)}; it must be a string")
    return value


def _fill_original(config: Mapping[str, Any], values: dict[str, Any], warnings: list[str]) -> None:
    if rope_type(values) not in _WITH_ORIGINAL:
        return
    key = "original_max_position_embeddings"
    top, inner = config.get(key), values.get(key)
    if top is not None:
        if inner is not None and inner != top:
            warnings.append(
                f"the top-level {key} ({short_repr(top)}) overrides the one beside the factors ({short_repr(inner)})"
            )
        values[key] = top
    elif inner is None:
        warnings.append(
            f"{key} is missing; transformers takes max_position_embeddings, so long "
            "factors are never used inside the window"
        )
        values[key] = config["max_position_embeddings"]


def _nested(
    config: Mapping[str, Any],
    family: Family,
    parameters: dict[str, Any],
    scaling: dict[str, Any],
    warnings: list[str],
) -> dict[str, HfRope]:
    if (
        parameters
        and not isinstance(parameters.get(FULL), Mapping)
        and not isinstance(parameters.get(SLIDING), Mapping)
    ):
        warnings.append(f"{family.name} ignores a rope_parameters that is not nested by layer type")
    full = dict(_object(parameters, FULL)) | scaling
    sliding = dict(_object(parameters, SLIDING))
    full.setdefault("rope_theta", config["rope_theta"])
    sliding.setdefault("rope_theta", config.get("rope_local_base_freq") or family.local_theta)
    for values in (full, sliding):
        values.setdefault("partial_rotary_factor", 1.0)
        if rope_type(values) in _WITH_ORIGINAL:
            values.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return {FULL: _rope(full), SLIDING: _rope(sliding)}


def _rope(values: dict[str, Any]) -> HfRope:
    kind = rope_type(values)
    parameters = {"rope_type": kind} | {key: value for key, value in values.items() if key not in ("type", "rope_type")}
    return HfRope(kind, positive(values, "rope_theta"), positive(values, "partial_rotary_factor"), parameters)
