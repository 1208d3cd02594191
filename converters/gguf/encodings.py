"""What a tensor's values become in a GGUF file: the types that are written, and the encoding of rows in each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import NumericalError

Rows = npt.NDArray[Any]


@dataclass(frozen=True)
class Dtype:
    """ggml's types of matrices, and of the token embedding and the output, which suffer most; `file_type` is
    general.file_type as in llama.h's llama_ftype.
    """

    matrices: str
    file_type: int
    ends: str


# What gguf-py can quantise. Embedding and output of ternary files are F16, as llama.cpp's script writes them.
DTYPES: Mapping[str, Dtype] = MappingProxyType(
    {
        "f32": Dtype("F32", 0, "F32"),
        "f16": Dtype("F16", 1, "F16"),
        "bf16": Dtype("BF16", 32, "BF16"),
        "q8_0": Dtype("Q8_0", 7, "Q8_0"),
        "q5_1": Dtype("Q5_1", 9, "Q8_0"),
        "q5_0": Dtype("Q5_0", 8, "Q8_0"),
        "q4_1": Dtype("Q4_1", 3, "Q8_0"),
        "q4_0": Dtype("Q4_0", 2, "Q8_0"),
        "mxfp4": Dtype("MXFP4", 38, "Q8_0"),
        "tq2_0": Dtype("TQ2_0", 37, "F16"),
        "tq1_0": Dtype("TQ1_0", 36, "F16"),
    }
)
_Q8_0_VALUES = 32
# Added before the fraction is cut off, it rounds halves away from 0; 0.5 itself would take 0.49999997 up to 1.
_NEARLY_HALF = np.nextafter(np.float32(0.5), np.float32(0))
_ENDS = ("token_embd.weight", "output.weight")
# Exponent of float16's least normal number and the number of its exponents, in bfloat16's bits.
_LEAST_NORMAL, _NORMALS = 113 << 7, 30 << 7
_INFINITE_16, _INFINITE_BF16, _SIGN, _REST = 0x7C00, 0x7F80, 0x8000, 0x7FFF


def ggml_type(name: str, shape: tuple[int, ...], dtype: str) -> str:
    """Name of the ggml type of the tensor `name`: vectors F32, rows that are no whole number of blocks F16."""
    if len(shape) < 2:
        return "F32"
    kind = DTYPES[dtype].ends if name in _ENDS else DTYPES[dtype].matrices
    return "F16" if shape[-1] % _layout(kind)[0] else kind


def encoded_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of `shape` in the ggml type `kind`."""
    block, size = _layout(kind)
    return prod(shape) // block * size


def _layout(kind: str) -> tuple[int, int]:
    """Values and bytes of a block."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(block), int(size)


def encode(rows: Rows, stored: str, kind: str, tensor: str) -> Rows:
    """`rows`, which are of the safetensors dtype `stored`, in the ggml type `kind`.

    `tensor` is the name in errors. Raises `NumericalError` when float16 cannot hold a value.
    """
    if stored == kind:
        return rows
    if kind != "F16":
        return _quantised(widened(rows, stored), kind)
    half = _halves_of_bfloat16(rows) if stored == "BF16" else _halves(rows)
    if _overflows(rows, stored, half):
        raise NumericalError(f"the tensor {tensor} has values beyond float16's range; convert with --dtype bf16")
    return half


def widened(rows: Rows, stored: str) -> npt.NDArray[np.float32]:
    """Rows of the safetensors dtype `stored` as float32."""
    if stored != "BF16":
        return rows.astype(np.float32, copy=False)
    wide = rows.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def _quantised(values: npt.NDArray[np.float32], kind: str) -> Rows:
    if kind == "F32":
        return values
    if kind == "Q8_0":
        return _eight_bits(values)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    found: Rows = quantize(values, GGMLQuantizationType[kind])
    return found


def _eight_bits(values: npt.NDArray[np.float32]) -> Rows:
    """Q8_0 with the bits of ggml's reference (and gguf-py's, in half of the time)."""
    blocks = values.reshape(-1, _Q8_0_VALUES)
    work = np.abs(blocks)
    peak = work
    while (half := peak.shape[1] // 2) > 0:  # twice as fast as `max` over rows of 32
        peak = np.maximum(peak[:, :half], peak[:, half:])
    scale = peak / np.float32(127)
    with np.errstate(over="ignore", invalid="ignore"):
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        np.multiply(blocks, inverse, out=work)
        work += np.copysign(_NEARLY_HALF, work)
        found = np.empty((len(blocks), 2 + _Q8_0_VALUES), dtype=np.uint8)
        found[:, :2] = scale.astype(np.float16).view(np.uint8)
        np.copyto(found[:, 2:].view(np.int8), work, casting="unsafe")  # cuts the fraction off
    return found.reshape(*values.shape[:-1], -1)


def _halves(rows: Rows) -> Rows:
    with np.errstate(over="ignore"):
        return rows.astype(np.float16, copy=False).view(np.uint16)


def _halves_of_bfloat16(bits: Rows) -> Rows:
    """float16 bits of bfloat16 bits: a shifted mantissa and another bias, where the number is normal in both."""
    flat = bits.reshape(-1)
    half = flat << 3
    half -= (_LEAST_NORMAL - (1 << 7)) << 3 & 0xFFFF
    half |= flat & _SIGN
    magnitude = flat & _REST
    magnitude -= _LEAST_NORMAL  # wraps around below it
    others = np.flatnonzero(magnitude >= _NORMALS)
    half[others] = _half_table()[flat[others]]
    return half.reshape(bits.shape)


@functools.cache
def _half_table() -> npt.NDArray[np.uint16]:
    """float16 bits of every bfloat16."""
    return _halves(widened(np.arange(1 << 16, dtype=np.uint16), "BF16"))


def _overflows(rows: Rows, stored: str, half: Rows) -> bool:
    """Whether a finite value became infinite."""
    if not rows.size or (half & _REST).max() < _INFINITE_16:
        return False
    became = rows[(half & _REST) == _INFINITE_16]
    return bool((became & _REST < _INFINITE_BF16).any() if stored == "BF16" else np.isfinite(became).any())
