"""Reading a model folder's tensors in blocks of rows; memory stays at a few blocks, whatever the tensors' sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.formats.safetensors_header import SafetensorsTensor, read_safetensors_header

# Values of a block: small enough for the processor's cache, large enough to hide the cost of Python.
_BLOCK_VALUES = 1 << 19
# bfloat16 is the upper half of a float32, and numpy has no type for it
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

Rows = npt.NDArray[Any]


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


def row_blocks(tensor: StoredTensor, heads: int | None = None) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of each block; `heads`: no block ends within a head."""
    rows, width = tensor.info.shape[0], prod(tensor.info.shape[1:])
    unit = rows // heads if heads else 1
    step = max(1, _BLOCK_VALUES // max(1, width * unit)) * unit
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def read_rows(tensor: StoredTensor, first: int, last: int) -> Rows:
    """Rows `first` to `last` as they are stored; BF16 as uint16, the others as floating-point numbers.

    Raises `UnsupportedModelError` for dtypes other than F64, F32, F16 and BF16, `InputFileError` for a file that ends
    early.
    """
    if tensor.info.dtype not in _STORED:
        raise UnsupportedModelError(
            f"{tensor.path} holds weights in {tensor.info.dtype}; save the model in bfloat16 or float32"
        )
    kind, width = np.dtype(_STORED[tensor.info.dtype]), prod(tensor.info.shape[1:])
    start = tensor.data_start + tensor.info.start + first * width * kind.itemsize
    try:
        values = np.fromfile(tensor.path, kind, (last - first) * width, offset=start)
    except OSError as error:
        raise InputFileError(f"{tensor.path} cannot be read: {error.strerror or error}") from error
    if len(values) != (last - first) * width:
        raise InputFileError(f"{tensor.path} is truncated: it ended while it was read")
    return values.reshape(last - first, *tensor.info.shape[1:])


def permute_pairs(values: Rows, heads: int) -> Rows:
    """Rows of a q or k weight (or bias) from transformers' pairs (i, i + d/2) to llama.cpp's (2i, 2i + 1),
    per head.
    """
    rows = values.shape[0]
    split = values.reshape(heads, 2, rows // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
