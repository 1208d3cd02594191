"""Reading the header of a GGUF file (metadata and tensor table) without reading arrays or weights.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every size and count is compared with the
bytes that are left before it is used: a header comes from a stranger.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.formats.ggml_types import block_layout
from longrope_export.formats.unfinished import SPOILED_MAGIC, refuse_unfinished

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
# value type → (struct format, numpy dtype); all little-endian
SCALARS: Mapping[int, tuple[struct.Struct, str]] = MappingProxyType(
    {
        UINT8: (struct.Struct("<B"), "u1"),
        INT8: (struct.Struct("<b"), "i1"),
        UINT16: (struct.Struct("<H"), "<u2"),
        INT16: (struct.Struct("<h"), "<i2"),
        UINT32: (struct.Struct("<I"), "<u4"),
        INT32: (struct.Struct("<i"), "<i4"),
        FLOAT32: (struct.Struct("<f"), "<f4"),
        BOOL: (struct.Struct("<B"), "?"),
        UINT64: (struct.Struct("<Q"), "<u8"),
        INT64: (struct.Struct("<q"), "<i8"),
        FLOAT64: (struct.Struct("<d"), "<f8"),
    }
)

# Far above every real file; they bound the time that a hostile (or sparse) file can cost.
MAX_ENTRIES = 1 << 13
MAX_TENSORS = 1 << 18
MAX_STRINGS = 1 << 24
MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 26
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME is 64 with the terminating zero
MAX_DIMENSIONS = 4
# A row of the tensor table and a character of a key or value take more memory than file. So that a header never takes
# more than twice the file and 16 MiB, a file has room for this many, and for more in proportion to its size.
_LEAST_TENSORS, _BYTES_PER_TENSOR = 1 << 13, 2048
_LEAST_TEXT_BYTES, _BYTES_PER_TEXT_BYTE = 1 << 20, 16

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """One key of the header; `start` and `end` are the file offsets of the whole key-value record.

    Arrays have `value` None, `array_type` and `array_length` set, and their elements from `elements` to
    `end`.
    """

    key: str
    value_type: int
    value: Any
    array_type: int | None
    array_length: int
    elements: int
    start: int
    end: int

    @property
    def is_array(self) -> bool:
        """Whether the value is an array, which only `GgufHeader.read_array` decodes."""
        return self.value_type == ARRAY


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One row of the tensor table; `start` and `end` are the file offsets of the row itself.

    `shape` is in ggml's `ne` order (fastest dimension first), `offset` relative to the header's
    `data_start`, `size` the number of bytes of its data.
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    size: int
    start: int
    end: int


@dataclass(frozen=True)
class GgufHeader:
    """A validated GGUF header.

    All positions are file offsets in bytes: the metadata ends at `kv_end`, the tensor table at `infos_end`,
    tensor data begins at `data_start` (which lies beyond `file_size` only in a file without tensors).
    `others` are the headers of a split model's further shards, where they were read (see `gguf_shards`).
    """

    path: Path
    version: int
    alignment: int
    metadata: Mapping[str, MetadataEntry]
    tensors: tuple[TensorInfo, ...]
    kv_start: int
    kv_end: int
    infos_end: int
    data_start: int
    file_size: int
    others: tuple[GgufHeader, ...] = ()

    def get(self, key: str, default: Any = None) -> Any:
        """Value of a scalar or string key; `default` when it is absent or an array."""
        entry = self.metadata.get(key)
        return default if entry is None or entry.is_array else entry.value

    def tensor(self, name: str) -> TensorInfo | None:
        """The tensor table's row for `name`, in whichever shard it is, or None."""
        return next((info for info in self.all_tensors if info.name == name), None)

    @property
    def all_tensors(self) -> tuple[TensorInfo, ...]:
        """The tensor tables of all shards."""
        return sum((shard.tensors for shard in self.others), self.tensors)

    def holder(self, info: TensorInfo) -> GgufHeader:
        """The shard whose table has the row `info`."""
        return next(shard for shard in (self, *self.others) if info in shard.tensors)

    def read_array(self, key: str) -> Any:
        """Decode one array: a list of str for strings (bytes that are no UTF-8 as surrogates), else a 1-D
        numpy array.

        Raises `InputFileError` when the key is absent, is no array, or the file has changed on disk.
        """
        entry = self.metadata.get(key)
        if entry is None or entry.array_type is None:
            raise InputFileError(f"{self.path} has no array {key!r}")
        raw = read_range(self.path, entry.elements, entry.end)
        if entry.array_type == STRING:
            return _decode_strings(raw, entry.array_length)
        import numpy as np  # only here: patching needs no arrays, and numpy takes a tenth of a second

        return np.frombuffer(raw, SCALARS[entry.array_type][1])


def read_gguf_header(path: str | os.PathLike[str]) -> GgufHeader:
    """Read and validate the header of the GGUF file at `path` (version 2 or 3, little-endian).

    Raises `InputFileError` when the file is missing, truncated, malformed, big-endian or of another version.
    """
    source = Path(path)
    if source.exists() and not source.is_file():
        raise InputFileError(f"{source} is not a regular file; name a GGUF file")
    try:
        with source.open("rb") as file:
            refuse_unfinished(source)
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise InputFileError(f"{source} is empty; download or convert it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return parse_gguf_header(source, view, size)
    except OSError as error:
        raise InputFileError(f"{source} cannot be read: {error.strerror or error}") from error


def read_range(path: Path, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of the file; raises `InputFileError` when they are not all there."""
    try:
        with path.open("rb") as file:
            file.seek(start)
            raw = file.read(end - start)
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) != end - start:
        raise InputFileError(f"{path} is truncated: {end:,} bytes are needed, {start + len(raw):,} are there")
    return raw


class _Cursor:
    """A position in the mapped file; every move is checked against the file's size."""

    def __init__(self, path: Path, view: mmap.mmap | bytes, file_size: int) -> None:
        self.path, self.view, self.size, self.position = path, view, len(view), 0
        self.text_left = _LEAST_TEXT_BYTES + file_size // _BYTES_PER_TEXT_BYTE

    def error(self, problem: str) -> InputFileError:
        # a key in it may be long
        return InputFileError(f"{self.path} is not a valid GGUF file: {problem[:500]}")

    def need(self, count: int) -> int:
        """Claim the next `count` bytes and return where they start."""
        start, end = self.position, self.position + count
        if end > self.size:
            raise InputFileError(
                f"{self.path} is truncated or damaged: the header needs at least {end:,} bytes, "
                f"the file has {self.size:,}; download or convert it again"
            )
        self.position = end
        return start

    def u32(self) -> int:
        return int(_U32.unpack_from(self.view, self.need(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.view, self.need(8))[0])

    def string(self, what: str, limit: int) -> bytes:
        length = self.u64()
        start = self.need(length)
        if length > limit:
            raise self.error(f"{what} has {length:,} bytes, at most {limit:,} are allowed")
        self.text_left -= length
        if self.text_left < 0:
            raise self.error(f"its keys and strings have too many bytes for a file of this size, up to {what}")
        return self.view[start : start + length]

    def name(self, what: str, limit: int) -> str:
        raw = self.string(what, limit)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} {raw[:80]!r} is not UTF-8") from None

    def skip_strings(self, key: str, count: int) -> None:
        """Walk over `count` strings by their lengths; the one loop whose speed matters."""
        if count > MAX_STRINGS:
            raise self.error(f"the array {key!r} has {count:,} strings, at most {MAX_STRINGS:,} are allowed")
        position, last, unpack, view = self.position, self.size - 8, _U64.unpack_from, self.view
        for _ in range(count):
            if position > last:
                break
            position += 8 + unpack(view, position)[0]
        else:
            self.need(position - self.position)
            return
        self.position = position
        self.need(8)


def parse_gguf_header(path: Path, view: mmap.mmap | bytes, file_size: int) -> GgufHeader:
    """The header that `view` holds (the whole file, or no less than its header) of a file of `file_size` bytes.

    Raises `InputFileError` as `read_gguf_header` does; `path` only stands in messages and in the result.
    """
    cursor = _Cursor(path, view, file_size)
    version = _read_version(cursor)
    tensor_count, entry_count = cursor.u64(), cursor.u64()
    kv_start = cursor.position
    _check_count(cursor, "metadata entries", entry_count, MAX_ENTRIES, least_bytes=13)
    metadata: dict[str, MetadataEntry] = {}
    for _ in range(entry_count):
        entry = _read_entry(cursor)
        if entry.key in metadata:
            raise cursor.error(f"the key {entry.key!r} appears twice")
        metadata[entry.key] = entry
    kv_end = cursor.position
    alignment = _alignment(cursor, metadata)
    most = min(MAX_TENSORS, _LEAST_TENSORS + file_size // _BYTES_PER_TENSOR)
    _check_count(cursor, "tensors", tensor_count, most, least_bytes=24)
    tensors = tuple(_read_tensor_infos(cursor, tensor_count, alignment))
    data_start = align(cursor.position, alignment)
    _check_data(path, tensors, data_start, file_size)
    return GgufHeader(
        path=path,
        version=version,
        alignment=alignment,
        metadata=MappingProxyType(metadata),
        tensors=tensors,
        kv_start=kv_start,
        kv_end=kv_end,
        infos_end=cursor.position,
        data_start=data_start,
        file_size=file_size,
    )


def align(position: int, alignment: int) -> int:
    """The next multiple of `alignment` (a power of two) at or after `position`."""
    return (position + alignment - 1) & ~(alignment - 1)


def _read_version(cursor: _Cursor) -> int:
    magic = cursor.view[: min(4, cursor.size)]
    if magic == SPOILED_MAGIC:
        raise cursor.error("a change in place was cut short, and its undo record is not beside it; put that back")
    if magic != MAGIC[: len(magic)]:
        raise cursor.error(f"it begins with {magic!r}, not with {MAGIC!r}")
    cursor.need(4)
    version = cursor.u32()
    if version in VERSIONS:
        return version
    if version and version & 0xFFFF == 0:
        raise cursor.error("it is big-endian; convert it with gguf-convert-endian")
    raise cursor.error(f"its version is {version}; versions 2 and 3 are read")


def _check_count(cursor: _Cursor, what: str, count: int, limit: int, least_bytes: int) -> None:
    cursor.need(count * least_bytes)
    cursor.position -= count * least_bytes
    if count > limit:
        raise cursor.error(f"it declares {count:,} {what}, at most {limit:,} are allowed")


def _read_entry(cursor: _Cursor) -> MetadataEntry:
    start = cursor.position
    key = cursor.name("a key", MAX_KEY_BYTES)
    value_type = cursor.u32()
    if value_type == ARRAY:
        array_type, length = cursor.u32(), cursor.u64()
        elements = cursor.position
        _skip_array(cursor, key, array_type, length)
        return MetadataEntry(key, ARRAY, None, array_type, length, elements, start, cursor.position)
    value = _read_value(cursor, key, value_type)
    return MetadataEntry(key, value_type, value, None, 0, cursor.position, start, cursor.position)


def _read_value(cursor: _Cursor, key: str, value_type: int) -> Any:
    if value_type == STRING:
        return cursor.string(f"the value of {key!r}", MAX_STRING_BYTES).decode(errors="replace")
    if value_type not in SCALARS:
        raise cursor.error(f"the key {key!r} has the unknown value type {value_type}")
    layout = SCALARS[value_type][0]
    value = layout.unpack_from(cursor.view, cursor.need(layout.size))[0]
    return bool(value) if value_type == BOOL else value


def _skip_array(cursor: _Cursor, key: str, array_type: int, length: int) -> None:
    if array_type == ARRAY:
        raise cursor.error(f"the key {key!r} is a nested array; GGUF readers refuse those")
    if array_type != STRING and array_type not in SCALARS:
        raise cursor.error(f"the array {key!r} has the unknown element type {array_type}")
    width = 8 if array_type == STRING else SCALARS[array_type][0].size
    cursor.need(length * width)
    if array_type == STRING:
        cursor.position -= length * width
        cursor.skip_strings(key, length)


def _alignment(cursor: _Cursor, metadata: Mapping[str, MetadataEntry]) -> int:
    entry = metadata.get(ALIGNMENT_KEY)
    if entry is None:
        return DEFAULT_ALIGNMENT
    if entry.value_type != UINT32 or entry.value == 0 or entry.value & (entry.value - 1):
        raise cursor.error(f"{ALIGNMENT_KEY} must be a UINT32 power of two, not {entry.value!r}")
    return int(entry.value)


def _read_tensor_infos(cursor: _Cursor, count: int, alignment: int) -> list[TensorInfo]:
    names: set[str] = set()
    infos: list[TensorInfo] = []
    expected = 0
    for _ in range(count):
        info = _read_tensor_info(cursor)
        if info.name in names:
            raise cursor.error(f"the tensor {info.name!r} appears twice")
        if info.offset != expected:
            raise cursor.error(f"the tensor {info.name!r} has offset {info.offset:,}, expected {expected:,}")
        names.add(info.name)
        infos.append(info)
        expected = align(info.offset + info.size, alignment)
    return infos


def _read_tensor_info(cursor: _Cursor) -> TensorInfo:
    start = cursor.position
    name = cursor.name("a tensor name", MAX_NAME_BYTES)
    dimensions = cursor.u32()
    if dimensions > MAX_DIMENSIONS:
        raise cursor.error(f"the tensor {name!r} has {dimensions:,} dimensions, at most {MAX_DIMENSIONS} are allowed")
    shape = tuple(cursor.u64() for _ in range(dimensions))
    ggml_type, offset = cursor.u32(), cursor.u64()
    size = _tensor_size(cursor, name, shape, ggml_type)
    return TensorInfo(name, shape, ggml_type, offset, size, start, cursor.position)


def _tensor_size(cursor: _Cursor, name: str, shape: tuple[int, ...], ggml_type: int) -> int:
    layout = block_layout(ggml_type)
    if layout is None:
        raise cursor.error(f"the tensor {name!r} has the unknown ggml type {ggml_type}")
    block, block_bytes = layout
    elements = 1
    for dimension in shape:
        elements *= dimension
        if elements >= 1 << 63 or dimension >= 1 << 63:
            raise cursor.error(f"the tensor {name!r} has the impossible shape {shape}")
    if (shape[0] if shape else 1) % block:
        raise cursor.error(
            f"the tensor {name!r} has rows of {shape[:1]} values, not a multiple of its block of {block}"
        )
    return elements // block * block_bytes


def _check_data(path: Path, tensors: tuple[TensorInfo, ...], data_start: int, file_size: int) -> None:
    for info in tensors:
        end = data_start + info.offset + info.size
        if end > file_size:
            raise InputFileError(
                f"{path} is truncated: the tensor {info.name!r} ends at byte {end:,}, "
                f"the file has {file_size:,}; download or convert it again"
            )


def _decode_strings(raw: bytes, count: int) -> list[str]:
    strings: list[str] = []
    position = 0
    for _ in range(count):
        (length,) = _U64.unpack_from(raw, position)
        position += 8
        strings.append(raw[position : position + length].decode(errors="surrogateescape"))
        position += length
    return strings
