"""Reading single tensors of a GGUF file, dequantised to float32 in chunks of rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.formats.ggml_types import block_layout, type_name
from longrope_export.formats.gguf_header import GgufHeader, TensorInfo, read_range

# Bytes of raw data that are dequantised at once; the dequantisers need several times as much.
_CHUNK_BYTES = 4 << 20


def read_raw(header: GgufHeader, name: str) -> bytes:
    """The stored bytes of tensor `name`, as they are in the file.

    Raises `InputFileError` when there is no such tensor or the file has changed since its header was read.
    """
    info = find_tensor(header, name)
    shard = header.holder(info)
    start = shard.data_start + info.offset
    return read_range(shard.path, start, start + info.size)


def read_tensor(header: GgufHeader, name: str) -> npt.NDArray[np.float32]:
    """Tensor `name` as float32, row-major: its numpy shape is ggml's `ne` reversed.

    F32, F16, BF16 and every quantised type that the `gguf` package can dequantise. Raises `InputFileError`
    when there is no such tensor, `UnsupportedModelError` for a type that cannot be dequantised.
    """
    info = find_tensor(header, name)
    shape = tuple(reversed(info.shape))
    if 0 in shape:
        return np.zeros(shape, np.float32)
    shard = header.holder(info)
    row_values = info.shape[0] if info.shape else 1
    rows = info.size // _row_bytes(info)
    result = np.empty((rows, row_values), np.float32)
    step = max(1, _CHUNK_BYTES // _row_bytes(info))
    for first in range(0, rows, step):
        last = min(first + step, rows)
        result[first:last] = _dequantized_rows(shard, info, first, last)
    return result.reshape(shape)


def find_tensor(header: GgufHeader, name: str) -> TensorInfo:
    """The tensor table's row for `name`; raises `InputFileError` when the file has no such tensor."""
    info = header.tensor(name)
    if info is None:
        raise InputFileError(f"{header.path} has no tensor {name!r}")
    return info


def _row_bytes(info: TensorInfo) -> int:
    layout = block_layout(info.ggml_type)
    assert layout is not None, "the header's reader refuses unknown types"
    block, block_bytes = layout
    return (info.shape[0] if info.shape else 1) // block * block_bytes


def _dequantized_rows(header: GgufHeader, info: TensorInfo, first: int, last: int) -> npt.NDArray[np.float32]:
    start = header.data_start + info.offset
    width = _row_bytes(info)
    raw = read_range(header.path, start + first * width, start + last * width)
    rows = np.frombuffer(raw, np.uint8).reshape(last - first, width)
    return _dequantize(info, rows)


def _dequantize(info: TensorInfo, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(info.ggml_type)
    plain = {
        GGMLQuantizationType.F32: "<f4",
        GGMLQuantizationType.F16: "<f2",
        GGMLQuantizationType.F64: "<f8",
    }
    if kind in plain:
        return rows.view(plain[kind]).astype(np.float32)
    try:
        # Overflow in a half-precision scale is the stranger's data, not our arithmetic.
        with np.errstate(all="ignore"):
            values: Any = dequantize(rows, kind)
    except NotImplementedError:
        raise UnsupportedModelError(
            f"the tensor {info.name!r} has type {type_name(info.ggml_type)}; it cannot be dequantised here"
        ) from None
    return np.asarray(values, np.float32)
