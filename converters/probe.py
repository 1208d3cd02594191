"""The first blocks of a model as a model of its own: cheap to run, and its RoPE is applied as in the whole."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

from longrope_export.converters.copying import copy_range
from longrope_export.converters.gguf.encode import encode_entry, encode_head, encode_string, encode_tensor_info
from longrope_export.errors import UnsupportedModelError
from longrope_export.files import atomic_output
from longrope_export.formats.gguf_header import (
    ARRAY,
    SCALARS,
    GgufHeader,
    MetadataEntry,
    TensorInfo,
    align,
    read_gguf_header,
    read_range,
)
from longrope_export.formats.gguf_shards import refuse_split

BLOCKS = 2

_BLOCK_NAME = re.compile(r"blk\.(\d+)\.")


def write_probe(source: str | os.PathLike[str], target: str | os.PathLike[str], *, blocks: int = BLOCKS) -> None:
    """Write `target`: the GGUF `source` with its first `blocks` blocks only, every kept tensor byte as it was.

    Embeddings, output, factors, tokenizer and all other keys stay; arrays with one value per block are cut too.
    Raises `InputFileError` for a damaged file, `UnsupportedModelError` where the blocks cannot be counted, and
    `OutputError`.
    """
    refuse_split(source)
    header = read_gguf_header(source)
    count = _block_count(header)
    kept = [info for info in header.tensors if _block(info) < blocks]
    entries = b"".join(_entry_bytes(header, entry, count, min(blocks, count)) for entry in header.metadata.values())
    head = encode_head(header.version, len(kept), len(header.metadata)) + entries + _table(header, kept)
    with Path(source).open("rb", buffering=0) as original, atomic_output(target) as file:
        file.write(head.ljust(align(len(head), header.alignment), b"\0"))
        for info in kept:
            copy_range(original, file, header.data_start + info.offset, info.size)
            file.write(bytes(align(file.tell(), header.alignment) - file.tell()))


def _block_count(header: GgufHeader) -> int:
    count = header.get(_block_count_key(header))
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UnsupportedModelError(f"{header.path} does not say how many blocks it has; verify it without --probe")
    return count


def _block_count_key(header: GgufHeader) -> str:
    return f"{header.get('general.architecture')}.block_count"


def _block(info: TensorInfo) -> int:
    """Number of the block that the tensor belongs to; -1 for embeddings, output and factors."""
    match = _BLOCK_NAME.match(info.name)
    return int(match.group(1)) if match else -1


def _entry_bytes(header: GgufHeader, entry: MetadataEntry, count: int, blocks: int) -> bytes:
    if entry.key == _block_count_key(header):
        return encode_entry(entry.key, blocks)
    raw = read_range(header.path, entry.start, entry.end)
    per_block = entry.key.startswith(f"{header.get('general.architecture')}.") and entry.array_length == count
    if not per_block or entry.array_type is None or entry.array_type not in SCALARS:
        return raw
    width = SCALARS[entry.array_type][0].size
    start = entry.elements - entry.start
    head = encode_string(entry.key) + struct.pack("<IIQ", ARRAY, entry.array_type, blocks)
    return head + raw[start : start + blocks * width]


def _table(header: GgufHeader, kept: list[TensorInfo]) -> bytes:
    rows, offset = [], 0
    for info in kept:
        rows.append(encode_tensor_info(info.name, info.shape, info.ggml_type, offset))
        offset = align(offset + info.size, header.alignment)
    return b"".join(rows)
