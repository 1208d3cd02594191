"""Describing a GGUF file from its header."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.description import ModelDescription
from longrope_export.errors import InputFileError, ScalingError, UnsupportedModelError
from longrope_export.families import FULL, SLIDING, family_for_gguf, gguf_architecture
from longrope_export.formats.ggml_types import type_name
from longrope_export.formats.gguf_header import FLOAT32, STRING, GgufHeader
from longrope_export.formats.gguf_scaling import (
    STATIC_TENSOR,
    gguf_rotary_dim,
    read_factors,
    scaling_from_gguf,
)
from longrope_export.formats.gguf_shards import read_gguf
from longrope_export.formats.hf_config import MAX_LAYERS
from longrope_export.formats.hf_description import window_warnings
from longrope_export.gguf_architectures import GgufArchitecture
from longrope_export.honours import honours
from longrope_export.rope.formulas import yarn_attention_factor
from longrope_export.rope.hf_types import factors_from_rope_parameters
from longrope_export.scaling import MAX_LENGTH, MAX_ROTARY_DIM, RopeScaling, to_float32

SCALING_TYPES = ("none", "linear", "yarn", "longrope")
# layers with full attention: every n-th, where the file has no pattern of its own
_PATTERN_PERIODS = {"gemma2": 2, "gemma3": 6}


def describe_gguf(path: Path) -> ModelDescription:
    """Describe a GGUF file; raises `InputFileError` or `UnsupportedModelError` (see `describe`)."""
    header = read_gguf(path)
    try:
        return _describe(header)
    except ScalingError as error:
        raise InputFileError(f"{path}: {error}") from None
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from None


def _describe(header: GgufHeader) -> ModelDescription:
    gguf = _rotating_architecture(header)
    keys = _Keys(header, gguf.name)
    heads, hidden = keys.count("attention.head_count"), keys.count("embedding_length")
    head_dim = keys.count("attention.key_length", hidden // heads or 1)
    rotary = gguf_rotary_dim(header, head_dim)
    if not 2 <= rotary <= MAX_ROTARY_DIM or rotary % 2:
        raise UnsupportedModelError(
            f"{gguf.name}.rope.dimension_count means {rotary} rotated values; it must be even and from 2"
        )
    window, layers = keys.count("context_length"), keys.count("block_count", limit=MAX_LAYERS)
    theta = keys.real("rope.freq_base", 10000.0)
    parameters, warnings = _rope_parameters(keys, theta, window)
    scaling = scaling_from_gguf(header)
    if scaling is not None:
        parameters["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        parameters["attention_factor"] = scaling.long_attention_factor
    factors, attention = _existing(header, keys, scaling, parameters, rotary, window)
    layer_types, sliding = _layer_types(keys, layers)
    tensors = [info for info in header.all_tensors if not info.name.startswith("rope_")]
    sizes = Counter[str]()
    for info in tensors:
        sizes[type_name(info.ggml_type)] += info.size
    family = family_for_gguf(gguf.name)
    return ModelDescription(
        kind="gguf", path=str(header.path), architecture=gguf.name, family=family, gguf=gguf,
        head_dim=head_dim, rotary_dim=rotary, rope_theta=theta, window=window, layers=layers, heads=heads,
        kv_heads=keys.count("attention.head_count_kv", heads), hidden=hidden, vocab=_vocab(keys),
        rope_type=parameters["rope_type"], rope_parameters=parameters, scaling=scaling,
        existing_factors=factors, existing_attention_factor=attention,
        layer_types=layer_types, sliding_window=sliding,
        parameters=sum(math.prod(info.shape) for info in tensors), tensor_bytes=dict(sorted(sizes.items())),
        honours=honours(family, gguf, "gguf"),
        warnings=tuple(warnings + _warnings(header, keys, gguf, scaling) + window_warnings(sliding, window)),
    )  # fmt: skip


def _rotating_architecture(header: GgufHeader) -> GgufArchitecture:
    name = header.get("general.architecture")
    if not isinstance(name, str) or not name:
        raise InputFileError(f"{header.path} has no general.architecture; it is not a model file")
    gguf = gguf_architecture(name)
    has_keys = any(f"{name}.{key}" in header.metadata for key in ("rope.freq_base", "rope.dimension_count"))
    if not gguf.has_rope or not (has_keys or f"{name}.context_length" in header.metadata):
        raise UnsupportedModelError(
            f"the architecture {name!r} has no rotary position embedding (RoPE); nothing to extend"
        )
    if not has_keys:
        raise UnsupportedModelError(
            f"neither {name}.rope.freq_base nor {name}.rope.dimension_count is in the file: it is not a RoPE model"
        )
    if gguf.pair_layout not in ("NORM", "NEOX"):
        raise UnsupportedModelError(
            f"the architecture {name!r} has multi-axis RoPE ({gguf.pair_layout}); it is not supported"
        )
    return gguf


class _Keys:
    """An architecture's keys with their types checked; for an array per layer the largest value counts."""

    def __init__(self, header: GgufHeader, architecture: str) -> None:
        self.header, self.architecture = header, architecture

    def value(self, name: str) -> Any:
        key = f"{self.architecture}.{name}"
        entry = self.header.metadata.get(key)
        if entry is None or not entry.is_array:
            return None if entry is None else entry.value
        if not 1 <= entry.array_length <= MAX_LAYERS or entry.array_type == STRING:
            raise InputFileError(
                f"{self.header.path}: the array {key} has {entry.array_length:,} "
                "elements; one number per layer is needed"
            )
        return self.header.read_array(key)

    def count(self, name: str, default: int | None = None, limit: int = MAX_LENGTH) -> int:
        value = self.value(name)
        if value is None and default is not None:
            return default
        if isinstance(value, np.ndarray):
            value = value.max().item()
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
            problem = "is missing" if value is None else f"is {str(value)[:40]!r}"
            raise InputFileError(
                f"{self.header.path}: the key {self.architecture}.{name} "
                f"{problem}; it must be a whole number from 1 to {limit}"
            )
        return value

    def scaling_type(self) -> str | None:
        entry = self.header.metadata.get(f"{self.architecture}.rope.scaling.type")
        if entry is not None and entry.value not in SCALING_TYPES:
            raise UnsupportedModelError(
                f"rope.scaling.type is {str(entry.value)[:40]!r}; llama.cpp knows {', '.join(SCALING_TYPES)} and aborts"
            )
        return None if entry is None else str(entry.value)

    def real(self, name: str, default: float) -> float:
        key = f"{self.architecture}.{name}"
        entry = self.header.metadata.get(key)
        if entry is None:
            return default
        if entry.value_type != FLOAT32 or not 0.0 < entry.value < math.inf:
            raise InputFileError(
                f"{self.header.path}: the key {key} must be a FLOAT32 above 0, not {str(entry.value)[:40]!r}"
            )
        return float(entry.value)


def _rope_parameters(keys: _Keys, theta: float, window: int) -> tuple[dict[str, Any], list[str]]:
    """The file's scaling under transformers' names, as llama.cpp applies it (llama-model.cpp, load_hparams)."""
    kind = keys.scaling_type()
    factor = keys.real("rope.scaling.factor", keys.real("rope.scale_linear", 1.0))
    static = keys.header.tensor(STATIC_TENSOR) is not None
    if kind == "yarn":
        original = keys.count("rope.scaling.original_context_length", window)
        attention = yarn_attention_factor(factor) * keys.real("rope.scaling.attn_factor", 1.0)
        named: dict[str, Any] = {
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": attention,
        }
        return {"rope_type": "yarn", "rope_theta": theta, **named}, []
    if kind == "longrope" and factor == 1.0:
        return {"rope_type": "longrope", "rope_theta": theta}, []
    if kind == "longrope":
        warning = "rope.scaling.factor stands beside longrope: llama.cpp interpolates on top of the factors"
        return {"rope_type": "longrope", "rope_theta": theta, "linear_factor": factor}, [warning]
    if static:
        return {"rope_type": "rope_freqs", "rope_theta": theta, "factor": factor}, []
    if factor != 1.0:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}, []
    return {"rope_type": "default", "rope_theta": theta}, []


def static_key_factors(header: GgufHeader, rotary_dim: int) -> npt.NDArray[np.float64] | None:
    """Divisors [rotary_dim // 2] that linear or YaRN keys apply at every length; None where there are none.

    Raises `InputFileError` or `UnsupportedModelError` for keys that cannot be read.
    """
    keys = _Keys(header, str(header.get("general.architecture")))
    window = keys.count("context_length")
    parameters, _ = _rope_parameters(keys, keys.real("rope.freq_base", 10000.0), window)
    if parameters["rope_type"] not in ("linear", "yarn"):
        return None
    return factors_from_rope_parameters(parameters, rotary_dim=rotary_dim, max_position_embeddings=window).factors


def _existing(
    header: GgufHeader,
    keys: _Keys,
    scaling: RopeScaling | None,
    parameters: dict[str, Any],
    rotary: int,
    window: int,
) -> tuple[tuple[float, ...] | None, float]:
    attention = keys.real("rope.scaling.attn_factor", 1.0)
    linear = float(parameters.get("linear_factor", parameters.get("factor", 1.0)))
    static = read_factors(header, STATIC_TENSOR)
    if static is not None and 2 * len(static) != rotary:
        raise InputFileError(f"{header.path}: {STATIC_TENSOR} has {len(static)} values, {rotary // 2} are needed")
    divisors = np.full(rotary // 2, linear)
    if scaling is not None and static is None:
        divisors, attention = divisors * np.array(scaling.short_factor), scaling.short_attention_factor
    elif parameters["rope_type"] == "yarn":
        found = factors_from_rope_parameters(parameters, rotary_dim=rotary, max_position_embeddings=window)
        divisors, attention = found.factors, found.attention_factor
    if static is not None:
        divisors = divisors * np.array(static)
    if attention == 1.0 and (divisors == 1.0).all():
        return None, 1.0
    return tuple(to_float32(value) for value in divisors), attention


def _layer_types(keys: _Keys, layers: int) -> tuple[tuple[str, ...], int | None]:
    window = keys.value("attention.sliding_window")
    if not isinstance(window, int) or isinstance(window, bool) or window <= 0:
        return (FULL,) * layers, None
    pattern = keys.value("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray) and len(pattern) >= layers:
        return tuple(SLIDING if bool(item) else FULL for item in pattern[:layers]), window
    period = _PATTERN_PERIODS.get(keys.architecture, 0)
    if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
        period = pattern
    if not period:  # llama.cpp applies no window there (for phi3 it says so)
        return (FULL,) * layers, None
    return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers)), window


def _vocab(keys: _Keys) -> int:
    tokens = keys.header.metadata.get("tokenizer.ggml.tokens")
    return keys.count("vocab_size", tokens.array_length if tokens is not None and tokens.array_length else None)


def _warnings(header: GgufHeader, keys: _Keys, gguf: GgufArchitecture, scaling: RopeScaling | None) -> list[str]:
    found = []
    kind = keys.scaling_type()
    names = {info.name for info in header.all_tensors}
    factor_names = sorted(names & {"rope_factors_long.weight", "rope_factors_short.weight"})
    if kind == "longrope" and not factor_names:
        found.append("rope.scaling.type is longrope, but there are no factor tensors: llama.cpp runs plain RoPE")
    if factor_names and not gguf.honours_factors:
        found.append(f"llama.cpp does not apply factor tensors for architecture {gguf.name} ({gguf.factors})")
    if factor_names and gguf.needs_type and kind != "longrope":
        found.append("factor tensors without rope.scaling.type = longrope: llama.cpp does not load the file")
    if factor_names and STATIC_TENSOR in names:
        found.append(f"{STATIC_TENSOR} stands beside long and short factors: llama.cpp does not load the file")
    if len(factor_names) == 1:
        found.append(f"only {factor_names[0]} is there: plain RoPE applies in the other regime")
    if factor_names and f"{gguf.name}.rope.scaling.original_context_length" not in header.metadata:
        found.append("rope.scaling.original_context_length is missing: long factors are never used inside the window")
    if scaling is not None and scaling.original_max_position_embeddings % 256:
        found.append(
            "the original window is no multiple of 256: llama.cpp pads the context and may choose long factors early"
        )
    if gguf.whole_head and gguf_rotary_dim(header, 0) not in (0, _head_dim(keys)):
        found.append("rope.dimension_count is not the head's size: llama.cpp does not load the file")
    return found


def _head_dim(keys: _Keys) -> int:
    return keys.count("attention.key_length", keys.count("embedding_length") // keys.count("attention.head_count") or 1)
