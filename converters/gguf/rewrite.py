"""A GGUF file with other keys and other small tensors: a new header in front of the same tensor bytes.

Untouched keys are copied as the bytes they are, so a vocabulary of any size costs nothing; tensor data is
copied in large blocks and never interpreted.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from longrope_export.converters.copying import SHARED_UNIT, can_share, copy_range
from longrope_export.converters.gguf.encode import (
    Int32,
    encode_entry,
    encode_head,
    encode_string,
    encode_tensor_info,
    filler_entry,
)
from longrope_export.converters.gguf.in_place_undo import UNDO_KEY
from longrope_export.errors import InputFileError, OutputError
from longrope_export.files import atomic_output
from longrope_export.formats.gguf_header import GgufHeader, TensorInfo, align, read_range
from longrope_export.formats.gguf_shards import TENSORS_KEY, shard_paths

_F32 = 0
# Zeros that put the tensor data where a copy can share the source's blocks; llama.cpp allows no others in front of them.
FILLER_KEY = "longrope_export.filler"
# The keys that are about one file's layout, not about its model.
_LAYOUT_KEYS = (UNDO_KEY, FILLER_KEY)
# Less is not worth a key.
_LEAST_SHARED = 1 << 20
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class GgufChanges:
    """Keys to set (behind the untouched ones, in this order) and to remove; tensors to drop and vectors to add
    as F32, last in the file. A key or tensor that is set or added replaces the one of that name. `rows` holds a new
    order of a tensor's rows (of a vector's values), as indices of the old one.
    """

    entries: Mapping[str, str | int | float] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    vectors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    rows: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.entries or self.removed or self.dropped or self.vectors or self.rows)


def rewrite_gguf(
    header: GgufHeader, target: str | os.PathLike[str], changes: GgufChanges, *, overwrite: bool = False
) -> None:
    """Write `target`: the GGUF file of `header` with `changes`; `target` may be the file itself (`overwrite`).

    Of a split model (`header.others`) all shards are written, `target` being the first; it appears last, so that no
    unfinished model can be opened. Raises `InputFileError` when a file changed since its header was read, and
    `OutputError`.
    """
    targets = _targets(header, Path(target))
    with contextlib.ExitStack() as outputs:
        for shard, path, change in zip((header, *header.others), targets, shard_changes(header, changes), strict=True):
            _write(shard, outputs.enter_context(atomic_output(path, overwrite=overwrite)), change)


def _targets(header: GgufHeader, target: Path) -> list[Path]:
    if not header.others:
        return [target]
    try:
        paths = shard_paths(target, 1 + len(header.others))
    except InputFileError as error:
        raise OutputError(str(error)) from None
    if paths[0] != target:
        raise OutputError(f"{target} is not the first shard; name the output {paths[0].name}")
    return paths


def shard_changes(header: GgufHeader, changes: GgufChanges) -> list[GgufChanges]:
    """What each shard of a model gets: keys and added vectors the first, all the new sum of tensors."""
    if not header.others:
        return [changes]
    parts = [changes, *(replace(changes, entries={}, removed=frozenset(), vectors={}) for _ in header.others)]
    replaced = changes.dropped | changes.vectors.keys()
    parts[1:] = [replace(part, dropped=replaced) for part in parts[1:]]
    kept = sum(len(kept_tensors(shard, part)) for shard, part in zip((header, *header.others), parts, strict=True))
    total = {TENSORS_KEY: Int32(kept + len(changes.vectors))}
    return [replace(part, entries={**part.entries, **total}) for part in parts]


def _write(header: GgufHeader, file: BinaryIO, changes: GgufChanges) -> None:
    kept = kept_tensors(header, changes)
    with header.path.open("rb", buffering=0) as original:
        file.write(_new_header(header, changes, Path(file.name).parent))
        start = file.tell()
        _copy_data(header, kept, original, file)
        file.write(vector_bytes(header.alignment, changes))
        _reorder_rows(header, kept, changes, file, start)


def rewritten_size(header: GgufHeader, changes: GgufChanges, folder: Path) -> int:
    """Bytes that `rewrite_gguf` would write into `folder`, in all shards."""
    shards = zip((header, *header.others), shard_changes(header, changes), strict=True)
    return sum(_shard_size(shard, change, folder) for shard, change in shards)


def _shard_size(header: GgufHeader, changes: GgufChanges, folder: Path) -> int:
    kept = sum(align(info.size, header.alignment) for info in kept_tensors(header, changes))
    return len(_new_header(header, changes, folder)) + kept + len(vector_bytes(header.alignment, changes))


def refuse_same_file(source: Path, target: Path) -> None:
    """Raise `OutputError` when `target` is `source` itself."""
    if source.exists() and target.exists() and source.samefile(target):
        raise OutputError(f"{target} is the source itself; name another output")


def kept_tensors(header: GgufHeader, changes: GgufChanges) -> list[TensorInfo]:
    """The tensors whose bytes stay, in the file's order."""
    return [info for info in header.tensors if info.name not in changes.dropped and info.name not in changes.vectors]


def _new_header(header: GgufHeader, changes: GgufChanges, folder: Path) -> bytes:
    """The changed file's header, longer where that lets its tensor data share the source's blocks."""
    if header.file_size - header.data_start < _LEAST_SHARED or not can_share(header.path, folder):
        return header_bytes(header, changes)
    start, _ = max(_runs(header, kept_tensors(header, changes)), key=lambda run: run[1], default=(0, 0))
    before = sum(run[1] for run in _runs(header, kept_tensors(header, changes)) if run[0] < start)
    return header_bytes(header, changes, remainder=(header.data_start + start - before) % SHARED_UNIT)


def header_bytes(header: GgufHeader, changes: GgufChanges, *, remainder: int | None = None) -> bytes:
    """The changed file's bytes up to its tensor data, padded to the alignment.

    `remainder`: made longer by a filler key, so that the length leaves this remainder modulo `SHARED_UNIT`.
    """
    entries, count = _entry_bytes(header, changes)
    kept = kept_tensors(header, changes)
    infos = _info_bytes(header, kept, changes)
    if remainder is not None:
        length = len(encode_head(header.version, 0, 0)) + len(entries) + len(filler_entry(FILLER_KEY, 0)) + len(infos)
        entries, count = entries + filler_entry(FILLER_KEY, (remainder - length) % SHARED_UNIT), count + 1
    raw = encode_head(header.version, len(kept) + len(changes.vectors), count) + entries + infos
    return raw.ljust(align(len(raw), header.alignment), b"\0")


def vector_bytes(alignment: int, changes: GgufChanges) -> bytes:
    """The added vectors' bytes, each padded to the alignment."""
    blocks = []
    for values in changes.vectors.values():
        raw = struct.pack(f"<{len(values)}f", *values)
        blocks.append(raw.ljust(align(len(raw), alignment), b"\0"))
    return b"".join(blocks)


def _entry_bytes(header: GgufHeader, changes: GgufChanges) -> tuple[bytes, int]:
    raw = read_range(header.path, header.kv_start, header.kv_end)
    untouched = [
        _renamed(raw[entry.start - header.kv_start : entry.end - header.kv_start], key)
        for key, entry in header.metadata.items()
        if key not in changes.entries and key not in changes.removed and key not in _LAYOUT_KEYS
    ]
    added = [encode_entry(key, value) for key, value in changes.entries.items()]
    return b"".join(untouched + added), len(untouched) + len(added)


def _renamed(record: bytes, key: str) -> bytes:
    """A key-value record under the name that the header gives it, which in a disguised one is not the file's."""
    (length,) = _LENGTH.unpack_from(record)
    return encode_string(key) + record[_LENGTH.size + length :]


def _info_bytes(header: GgufHeader, kept: list[TensorInfo], changes: GgufChanges) -> bytes:
    """The tensor table with contiguous offsets, which llama.cpp demands, and the added vectors last."""
    rows = []
    offset = 0
    for info in kept:
        rows.append(encode_tensor_info(info.name, info.shape, info.ggml_type, offset))
        offset += align(info.size, header.alignment)
    for name, values in changes.vectors.items():
        rows.append(encode_tensor_info(name, (len(values),), _F32, offset))
        offset += align(4 * len(values), header.alignment)
    return b"".join(rows)


def _copy_data(header: GgufHeader, kept: list[TensorInfo], original: BinaryIO, file: BinaryIO) -> None:
    for start, length in _runs(header, kept):
        copy_range(
            original,
            file,
            header.data_start + start,
            min(length, header.file_size - header.data_start - start),
        )
        file.write(bytes(align(file.tell(), header.alignment) - file.tell()))


def _reorder_rows(header: GgufHeader, kept: list[TensorInfo], changes: GgufChanges, file: BinaryIO, start: int) -> None:
    for info in kept:
        order = changes.rows.get(info.name)
        if order:
            old = header.data_start + info.offset
            raw, width = read_range(header.path, old, old + info.size), info.size // len(order)
            file.seek(start)
            file.write(b"".join(raw[row * width : (row + 1) * width] for row in order))
        start += align(info.size, header.alignment)


def _runs(header: GgufHeader, kept: list[TensorInfo]) -> list[tuple[int, int]]:
    """Offsets and padded lengths of what is copied, neighbours joined."""
    runs: list[tuple[int, int]] = []
    for info in kept:
        length = align(info.size, header.alignment)
        if runs and sum(runs[-1]) == info.offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((info.offset, length))
    return runs
