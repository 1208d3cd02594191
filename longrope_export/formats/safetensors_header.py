"""Reading the header of a safetensors file without reading tensors.

The limits are the format's own (https://github.com/huggingface/safetensors#format), checked strictly:
duplicate keys, holes, overlaps and bytes after the data are refused.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from longrope_export.errors import InputFileError

MAX_HEADER_BYTES = 100_000_000
# Parsed JSON can take sixty times its text. So that a header never takes more memory than twice the file and 16 MiB, it
# may have this many bytes, and more in proportion to the file.
_LEAST_HEADER_BYTES, _BYTES_PER_HEADER_BYTE = 1 << 18, 32
METADATA_KEY = "__metadata__"
_DTYPES_BY_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64 C64",
}
DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {name: bits for bits, names in _DTYPES_BY_BITS.items() for name in names.split()}
)
_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class SafetensorsTensor:
    """One tensor of the header; `start` and `end` are offsets in bytes from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """A validated safetensors header; data begins at `8 + header_size`."""

    path: Path
    metadata: Mapping[str, str]
    tensors: Mapping[str, SafetensorsTensor]
    header_size: int
    file_size: int

    @property
    def data_start(self) -> int:
        """File offset of the first tensor's data."""
        return 8 + self.header_size


def read_safetensors_header(path: str | os.PathLike[str]) -> SafetensorsHeader:
    """Read and validate the header of the safetensors file at `path`.

    Raises `InputFileError` when the file is missing, truncated or malformed.
    """
    source = Path(path)
    if source.exists() and not source.is_file():
        raise InputFileError(f"{source} is not a regular file; name a .safetensors file")
    try:
        with source.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(source, file.read(8), size)
            raw = file.read(length)
    except OSError as error:
        raise InputFileError(f"{source} cannot be read: {error.strerror or error}") from error
    return parse_safetensors_header(source, raw, size)


def parse_safetensors_header(path: Path, raw: bytes, file_size: int) -> SafetensorsHeader:
    """The header whose JSON (and the spaces behind it) is `raw`, in front of as many data bytes as fill the file.

    Raises `InputFileError` when it is malformed.
    """
    source, size, length = path, file_size, len(raw)
    values = _parse_json(source, raw)
    metadata = _metadata(source, values.pop(METADATA_KEY, {}))
    tensors = {name: _tensor(source, name, entry) for name, entry in values.items()}
    _check_coverage(source, tensors, size - 8 - length)
    return SafetensorsHeader(source, MappingProxyType(metadata), MappingProxyType(tensors), length, size)


def most_header_bytes(file_size: int) -> int:
    """How long a header may be that is read here, in a file of `file_size` bytes."""
    return min(MAX_HEADER_BYTES, _LEAST_HEADER_BYTES + file_size // _BYTES_PER_HEADER_BYTE)


def _invalid(path: Path, problem: str) -> InputFileError:
    # a tensor's name in it may be long
    return InputFileError(f"{path} is not a valid safetensors file: {problem[:500]}")


def _header_length(path: Path, raw: bytes, size: int) -> int:
    if len(raw) < 8:
        raise InputFileError(f"{path} is truncated: a safetensors file has at least 8 bytes, this one {size}")
    length = int(_U64.unpack(raw)[0])
    if length > MAX_HEADER_BYTES:
        raise _invalid(path, f"its header declares {length:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed")
    if 8 + length > size:
        raise InputFileError(
            f"{path} is truncated: the header needs {8 + length:,} bytes, the file has {size:,}; download it again"
        )
    if length > most_header_bytes(size):
        raise _invalid(path, f"its header has {length:,} bytes, too many for a file of {size:,}")
    return length


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise _invalid(path, "its header does not begin with '{'")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise _invalid(path, "its header has a duplicate key")
        return result

    try:
        values = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _invalid(path, f"its header is not JSON ({str(error)[:100]})") from None
    return dict(values)


def _metadata(path: Path, values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise _invalid(path, f"{METADATA_KEY} must map strings to strings")
    return dict(values)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _sizes(value: Any) -> tuple[int, ...] | None:
    return tuple(value) if isinstance(value, list) and all(_is_size(item) for item in value) else None


def _tensor(path: Path, name: str, entry: Any) -> SafetensorsTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _invalid(path, f"the tensor {name!r} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], _sizes(entry["shape"]), _sizes(entry["data_offsets"])
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _invalid(path, f"the tensor {name!r} has the unknown dtype {str(dtype)[:40]!r}")
    if shape is None or offsets is None or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise _invalid(path, f"the tensor {name!r} has an impossible shape or impossible offsets")
    bits = DTYPE_BITS[dtype]
    for dimension in shape:
        bits *= dimension
        if bits >= 1 << 66:
            raise _invalid(path, f"the tensor {name!r} has an impossible shape")
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _invalid(
            path,
            f"the tensor {name!r} has {offsets[1] - offsets[0]:,} bytes, its shape needs {bits / 8:,.0f}",
        )
    return SafetensorsTensor(dtype, shape, offsets[0], offsets[1])


def _check_coverage(path: Path, tensors: Mapping[str, SafetensorsTensor], data_size: int) -> None:
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise _invalid(path, f"the tensor {name!r} begins at {tensor.start:,}, expected {position:,}")
        position = tensor.end
    if position > data_size:
        raise InputFileError(
            f"{path} is truncated: its tensors need {position:,} bytes, {data_size:,} are there; download it again"
        )
    if position < data_size:
        raise _invalid(path, f"{data_size - position:,} bytes after its tensors belong to none")
