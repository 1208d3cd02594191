"""The `RopeScaling` that a GGUF file carries: our own record, or what its tensors and keys say."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.formats.gguf_header import FLOAT32, UINT32, UINT64, GgufHeader, TensorInfo
from longrope_export.formats.hf_scaling import check_agreement
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES
from longrope_export.scaling import MAX_ROTARY_DIM, Factors, RopeScaling

RECORD_KEY = "longrope_export.scaling"
# The attention factor that is in the softmax scale instead of on cos and sin (granite's attention.scale).
FOLDED_KEY = "longrope_export.attention_factor_in_scale"
LONG_TENSOR = "rope_factors_long.weight"
SHORT_TENSOR = "rope_factors_short.weight"
STATIC_TENSOR = "rope_freqs.weight"
_F32 = 0


def scaling_from_gguf(header: GgufHeader) -> RopeScaling | None:
    """The record in a GGUF file; None when it carries neither our key nor long or short factors.

    Our own key `longrope_export.scaling` gives the whole record and must agree, in float32 bits, with the
    tensors and keys that llama.cpp reads. Without it the record is what llama.cpp does with them: an absent
    set is all ones, an absent attn_factor 1, an absent original_context_length the context length. Raises
    `InputFileError` when they are malformed or disagree, `ScalingError` when they are no valid record.
    """
    found = factors_scaling(header)
    text = header.get(RECORD_KEY)
    if text is None:
        return found
    if not isinstance(text, str):
        raise InputFileError(f"{header.path}: the key {RECORD_KEY} is not a string")
    own = RopeScaling.from_json(text)
    if found is None:
        found = _static_scaling(header, own)
    check_agreement(own, found, f"{header.path}: the key {RECORD_KEY}", "the tensors and keys that llama.cpp reads")
    return own


def factors_scaling(header: GgufHeader) -> RopeScaling | None:
    """The record that long and short factor tensors express, whatever our own key says; None without them."""
    long, short = read_factors(header, LONG_TENSOR), read_factors(header, SHORT_TENSOR)
    if long is None and short is None:
        return None
    ones = (1.0,) * len(long or short or ())
    return _record(header, long or ones, short or ones, "GGUF factor tensors")


def _check_length(header: GgufHeader, pairs: int) -> None:
    rotary_dim = gguf_rotary_dim(header, 0) or 2 * pairs
    if rotary_dim != 2 * pairs:
        raise InputFileError(
            f"{header.path}: the factor tensors have {pairs} values, rope.dimension_count needs {rotary_dim // 2}"
        )


def read_factors(header: GgufHeader, name: str) -> Factors | None:
    """Values of a 1-D F32 factor tensor, or None when it is absent.

    Raises `InputFileError` for another type or shape: llama.cpp aborts or refuses such a file.
    """
    info = header.tensor(name)
    if info is None:
        return None
    if info.ggml_type != _F32 or len(_dimensions(info)) != 1 or not 1 <= info.shape[0] <= MAX_ROTARY_DIM // 2:
        raise InputFileError(
            f"{header.path}: the tensor {name} must be one F32 row of at most {MAX_ROTARY_DIM // 2} values"
        )
    from longrope_export.formats.gguf_tensors import read_raw

    # not through numpy, which warns about some NaNs
    return struct.unpack(f"<{info.shape[0]}f", read_raw(header, name))


def _dimensions(info: TensorInfo) -> tuple[int, ...]:
    shape = info.shape
    while len(shape) > 1 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _static_scaling(header: GgufHeader, own: RopeScaling) -> RopeScaling:
    """What a static `rope_freqs.weight` expresses: one set for every length; L has no key, so the record's
    is taken.
    """
    factors = read_factors(header, STATIC_TENSOR)
    if factors is None:
        raise InputFileError(
            f"{header.path} has the key {RECORD_KEY}, but no factor tensors; write it again with `longrope patch`"
        )
    found = _record(header, factors, factors, "GGUF rope_freqs")
    return replace(found, original_max_position_embeddings=own.original_max_position_embeddings)


def _record(header: GgufHeader, long: Factors, short: Factors, source: str) -> RopeScaling:
    _check_length(header, len(long))
    window = _count(header, "context_length", None)
    attention = _attention_factor(header, 2 * len(long))
    return RopeScaling(
        rope_theta=_real(header, "rope.freq_base", 10000.0),
        rotary_dim=2 * len(long),
        original_max_position_embeddings=_count(header, "rope.scaling.original_context_length", window),
        max_position_embeddings=window,
        long_factor=long,
        short_factor=short,
        long_attention_factor=attention,
        short_attention_factor=attention,
        provenance={"source": source},
    )


def _attention_factor(header: GgufHeader, rotary_dim: int) -> float:
    """The key's, or the one that our own key says to be in the softmax scale, which must hold it."""
    folded = header.get(FOLDED_KEY)
    if folded is None:
        return _real(header, "rope.scaling.attn_factor", 1.0)
    scale = _real(header, "attention.scale", 0.0)
    if not isinstance(folded, float) or not math.isclose(folded**2, scale * rotary_dim**0.5, rel_tol=1e-5):
        raise InputFileError(
            f"{header.path}: attention.scale is {scale:g}, which does not hold the attention factor {folded} of "
            f"{FOLDED_KEY}; write the file again"
        )
    return folded


def architecture_key(header: GgufHeader, name: str) -> str:
    """The full key of an architecture's value, such as `llama.context_length`."""
    return f"{header.get('general.architecture')}.{name}"


def _count(header: GgufHeader, name: str, default: int | None) -> int:
    key = architecture_key(header, name)
    entry = header.metadata.get(key)
    if entry is None and default is not None:
        return default
    if entry is None or entry.value_type not in (UINT32, UINT64):
        raise InputFileError(f"{header.path}: the key {key} is missing or not an unsigned integer")
    return int(entry.value)


def _real(header: GgufHeader, name: str, default: float) -> float:
    key = architecture_key(header, name)
    entry = header.metadata.get(key)
    if entry is None:
        return default
    if entry.value_type != FLOAT32:
        raise InputFileError(f"{header.path}: the key {key} is not a FLOAT32 value")
    return float(entry.value)


def gguf_rotary_dim(header: GgufHeader, head_dim: int) -> int:
    """Rotated values per head: rope.dimension_count (divided where the architecture doubles it), else the
    head's size.
    """
    architecture: Any = header.get("general.architecture")
    row = GGUF_ARCHITECTURES.get(architecture)
    scale = 1 if row is None else row.dimension_count_scale
    return _count(header, "rope.dimension_count", head_dim * scale) // scale
