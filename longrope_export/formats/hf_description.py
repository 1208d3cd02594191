"""Describing a Hugging Face model folder from config.json and safetensors headers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope_export.description import ModelDescription
from longrope_export.errors import InputFileError, LongRopeError
from longrope_export.families import (
    FULL,
    SLIDING,
    Family,
    family_for_config,
    gguf_architecture,
    head_dim,
    rotary_dim,
)
from longrope_export.formats.hf_config import HfRope, config_values, count, read_json, rope_by_layer_type
from longrope_export.formats.hf_scaling import scaling_from_config
from longrope_export.formats.safetensors_header import SafetensorsHeader, read_safetensors_header
from longrope_export.honours import honours
from longrope_export.rope.formulas import longrope_attention_factor
from longrope_export.rope.hf_types import factors_from_rope_parameters
from longrope_export.scaling import RopeScaling, short_repr, to_float32

CONFIG_FILE = "config.json"
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


def describe_folder(folder: Path) -> ModelDescription:
    """Describe a model folder; raises `InputFileError` or `UnsupportedModelError` (see `describe`)."""
    config = read_json(_config_path(folder))
    try:
        return _describe(folder, config)
    except LongRopeError as error:
        prefix = f"{folder / CONFIG_FILE}: "
        message = str(error).removeprefix("config.json: ")
        raise type(error)(message if message.startswith(str(folder)) else prefix + message) from None


def _config_path(folder: Path) -> Path:
    path = folder / CONFIG_FILE
    if not path.is_file():
        ggufs = sorted(folder.glob("*.gguf"))
        hint = f"its GGUF file, for example {ggufs[0]}" if ggufs else "a model folder or a .gguf file"
        raise InputFileError(f"{folder} has no {CONFIG_FILE}; name {hint}")
    return path


def _describe(folder: Path, config: dict[str, Any]) -> ModelDescription:
    family = family_for_config(config.get("model_type"))
    values = config_values(config, family)
    ropes, warnings = rope_by_layer_type(values, family)
    rope = ropes[FULL]
    heads, window = count(values, "num_attention_heads"), count(values, "max_position_embeddings")
    kv_heads = heads if values.get("num_key_value_heads") is None else count(values, "num_key_value_heads")
    size = head_dim(family, values)
    rotary = rotary_dim(family, size, rope.partial_rotary_factor)
    scaling = scaling_from_config(config)
    factors, attention = _existing(rope, rotary, window)
    layer_types = _layer_types(family, values)
    sliding = count(values, "sliding_window") if SLIDING in layer_types else None
    parameters, tensor_bytes = _weights(folder, warnings)
    gguf = gguf_architecture(family.gguf_architectures[0])
    return ModelDescription(
        kind="hf", path=str(folder), architecture=str(config["model_type"]), family=family, gguf=gguf,
        head_dim=size, rotary_dim=rotary, rope_theta=rope.rope_theta, window=window,
        layers=count(values, "num_hidden_layers"), heads=heads,
        kv_heads=kv_heads, hidden=count(values, "hidden_size"), vocab=count(values, "vocab_size"),
        rope_type=rope.rope_type, rope_parameters=dict(rope.parameters), scaling=scaling,
        existing_factors=factors, existing_attention_factor=attention,
        layer_types=layer_types, sliding_window=sliding, parameters=parameters, tensor_bytes=tensor_bytes,
        honours=honours(family, gguf, "hf"),
        warnings=(*warnings, *rope_warnings(rope, scaling, values), *window_warnings(sliding, window)),
    )  # fmt: skip


def _existing(rope: HfRope, rotary_dim: int, window: int) -> tuple[tuple[float, ...] | None, float]:
    if rope.rope_type == "default":
        return None, 1.0
    parameters = {"su": "longrope"}.get(rope.rope_type, rope.rope_type)
    found = factors_from_rope_parameters(
        {**_without_mscale(rope.parameters), "rope_type": parameters},
        rotary_dim=rotary_dim,
        max_position_embeddings=window,
    )
    return tuple(to_float32(value) for value in found.factors), float(found.attention_factor)


def _without_mscale(parameters: Mapping[str, Any]) -> dict[str, Any]:
    # transformers ignores them; a warning says so instead of a refusal.
    longrope = parameters["rope_type"] in ("longrope", "su")
    return {
        key: value for key, value in parameters.items() if not (longrope and key in ("short_mscale", "long_mscale"))
    }


def _layer_types(family: Family, values: Mapping[str, Any]) -> tuple[str, ...]:
    layers = values["num_hidden_layers"]
    explicit = values.get("layer_types")
    if explicit is None or not family.reads_layer_types:
        return family.layer_types(values, layers)
    if not isinstance(explicit, list) or len(explicit) != layers or not set(map(str, explicit)) <= {FULL, SLIDING}:
        raise InputFileError(f"config.json: layer_types must be {layers} times {FULL} or {SLIDING}")
    return tuple(explicit)


def rope_warnings(rope: HfRope, scaling: RopeScaling | None, values: Mapping[str, Any]) -> list[str]:
    """What runtimes read differently from one another in these longrope parameters."""
    if scaling is None:
        return []
    found: list[str] = []
    ratio, factor = scaling.factor, rope.parameters.get("factor")
    if factor is not None and not math.isclose(factor, ratio, rel_tol=1e-6):
        found.append(
            f"factor is {factor:g}, the windows' ratio {ratio:g}: transformers uses "
            "factor, vLLM and GGUF converters the ratio"
        )
    formula = longrope_attention_factor(ratio, scaling.original_max_position_embeddings)
    if not math.isclose(scaling.long_attention_factor, formula, rel_tol=1e-5):
        found.append(
            f"attention_factor {scaling.long_attention_factor:.6g} is not √(1 + ln s/ln "
            "L); vLLM, mlx-lm and ExLlama ignore it"
        )
    if any(rope.parameters.get(name) is not None for name in ("short_mscale", "long_mscale")):
        found.append("short_mscale and long_mscale are read by vLLM and SGLang, ignored by transformers")
    if rope.rope_type == "su":
        found.append("rope_type 'su' is an old name of 'longrope'; transformers 5 does not read it")
    if not values.get("rope_scaling"):
        found.append("only rope_parameters is written: transformers 4 and mlx-lm read rope_scaling")
    if scaling.factor == 1.0:
        found.append("max_position_embeddings equals the original window: the long factors are never used inside it")
    return found


def window_warnings(sliding: int | None, window: int) -> list[str]:
    """What a sliding window shorter than the model's window means."""
    if sliding is None or sliding >= window:
        return []
    return [f"layers with sliding attention see {sliding:,} tokens only; factors matter in the full-attention layers"]


def _weights(folder: Path, warnings: list[str]) -> tuple[int, dict[str, int]]:
    files = weight_files(folder)
    if not files:
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        warnings.append(
            "weights are pickle files, which are refused" if pickles else "the folder has no .safetensors weights"
        )
    parameters, sizes = 0, Counter[str]()
    for file in files:
        header = read_safetensors_header(file)
        parameters += sum(math.prod(tensor.shape) for tensor in header.tensors.values())
        sizes += _sizes(header)
    return parameters, dict(sorted(sizes.items()))


def _sizes(header: SafetensorsHeader) -> Counter[str]:
    sizes = Counter[str]()
    for tensor in header.tensors.values():
        sizes[tensor.dtype] += tensor.end - tensor.start
    return sizes


def weight_files(folder: Path) -> list[Path]:
    """The folder's safetensors files, as transformers chooses: model.safetensors, else those of its index; else all.

    Raises `InputFileError` for an index that is malformed, names a file outside the folder, or one that is
    missing.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return [single]
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise InputFileError(f"{index} has no weight_map of names")
    for name in sorted(set(names.values())):
        if name == ".." or Path(name).name != name or "\\" in name or "\0" in name:
            raise InputFileError(f"{index} names {short_repr(name)}, which is not a file name in the folder")
        if not (folder / name).is_file():
            raise InputFileError(f"{folder / name} is missing, but {index} names it; download it again")
    return [folder / name for name in sorted(set(names.values()))]
