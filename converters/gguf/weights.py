"""Reading a model folder's tensors one by one and encoding each for GGUF; memory stays near the largest
tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import InputFileError, NumericalError, UnsupportedModelError
from longrope_export.formats.gguf_header import read_range
from longrope_export.formats.safetensors_header import SafetensorsTensor, read_safetensors_header

Array32 = npt.NDArray[np.float32]

# dtype option → (ggml type's name, general.file_type as in llama.h's llama_ftype)
DTYPES: Mapping[str, tuple[str, int]] = {
    "f32": ("F32", 0),
    "f16": ("F16", 1),
    "bf16": ("BF16", 32),
    "q8_0": ("Q8_0", 7),
}
_Q8_0_BLOCK = 32


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a shard: where its bytes are, and what they are."""

    path: Path
    data_start: int
    info: SafetensorsTensor


def stored_tensors(shards: list[Path]) -> dict[str, StoredTensor]:
    """Every tensor of the shards by name; raises `InputFileError` when two shards hold one name."""
    found: dict[str, StoredTensor] = {}
    for path in shards:
        header = read_safetensors_header(path)
        for name, info in header.tensors.items():
            if name in found:
                raise InputFileError(f"{path} and {found[name].path} both hold the tensor {name[:200]!r}")
            found[name] = StoredTensor(path, header.data_start, info)
    return found


def read_stored(tensor: StoredTensor) -> Array32:
    """The tensor as float32; raises `UnsupportedModelError` for dtypes other than F64, F32, F16 and BF16."""
    start = tensor.data_start + tensor.info.start
    raw = read_range(tensor.path, start, start + tensor.info.end - tensor.info.start)
    plain = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}.get(tensor.info.dtype)
    if plain:
        return np.frombuffer(raw, plain).astype(np.float32, copy=False).reshape(tensor.info.shape)
    if tensor.info.dtype == "BF16":
        # bfloat16 is the upper half of a float32
        wide = np.frombuffer(raw, "<u2").astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32).reshape(tensor.info.shape)
    raise UnsupportedModelError(
        f"{tensor.path} holds weights in {tensor.info.dtype}; save the model in bfloat16 or float32"
    )


def ggml_type(shape: tuple[int, ...], dtype: str) -> str:
    """Name of the ggml type in which a tensor of `shape` is stored: vectors F32, short rows of q8_0 F16."""
    if len(shape) < 2:
        return "F32"
    name = DTYPES[dtype][0]
    return "F16" if name == "Q8_0" and shape[-1] % _Q8_0_BLOCK else name


def encoded_bytes(shape: tuple[int, ...], name: str) -> int:
    """Bytes of a tensor of `shape` in the ggml type `name`."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
    return int(np.prod(shape, dtype=np.int64)) // int(block) * int(size)


def encode(values: Array32, name: str, tensor: str) -> npt.NDArray[Any]:
    """`values` in the ggml type `name`; raises `NumericalError` when float16 cannot hold them."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    if name == "F32":
        return values
    if name == "F16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if np.isfinite(values).all() and not np.isfinite(half).all():
            raise NumericalError(f"the tensor {tensor} has values beyond float16's range; convert with --dtype bf16")
        return half
    encoded: npt.NDArray[Any] = quantize(values, GGMLQuantizationType[name])
    return encoded


def permute_pairs(values: Array32, heads: int) -> Array32:
    """Rows of a q or k weight (or bias) from transformers' pairs (i, i + d/2) to llama.cpp's (2i, 2i + 1),
    per head.
    """
    rows = values.shape[0]
    split = values.reshape(heads, 2, rows // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
