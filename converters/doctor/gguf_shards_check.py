"""Checks of a split GGUF model's keys and files."""

from __future__ import annotations

from dataclasses import replace

from longrope_export.converters.doctor.findings import Finding
from longrope_export.converters.doctor.gguf_rules import GGUF_RULES
from longrope_export.converters.gguf.encode import Int32, UInt16
from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.errors import InputFileError
from longrope_export.formats.gguf_header import INT32, UINT16, GgufHeader, read_gguf_header
from longrope_export.formats.gguf_shards import COUNT_KEY, NUMBER_KEY, TENSORS_KEY, shard_count, shard_paths


def split(header: GgufHeader) -> tuple[list[Finding], GgufHeader | None]:
    """G30: findings of one shard, and the whole model's header when it is the first (or the only) file.

    The whole is None for the other shards, whose tensors are looked at with the first one's keys.
    """
    path = header.path
    try:
        count = shard_count(header)
        paths = shard_paths(path, count) if count > 1 else [path]
    except InputFileError as error:
        return [_finding(header, str(error), "give the file the name that it had")], None
    found = _number(header, paths.index(path), count) if count > 1 else []
    if count == 1 or path != paths[0]:
        return found, header if count == 1 else None
    if missing := [shard for shard in paths if not shard.is_file()]:
        return [*found, _finding(header, f"{missing[0].name} is missing", "download it again")], None
    whole = replace(header, others=tuple(read_gguf_header(shard) for shard in paths[1:]))
    return found + _total(whole), whole


def _finding(header: GgufHeader, detail: str, advice: str, changes: GgufChanges | None = None) -> Finding:
    return Finding(GGUF_RULES["G30"], str(header.path), detail, advice, changes)


def _number(header: GgufHeader, number: int, count: int) -> list[Finding]:
    entry = header.metadata.get(NUMBER_KEY)
    if entry is not None and entry.value_type == UINT16 and entry.value == number:
        return []
    changes = GgufChanges(entries={NUMBER_KEY: UInt16(number), COUNT_KEY: UInt16(count)})
    said = "missing" if entry is None else entry.value
    return [_finding(header, f"{NUMBER_KEY} is {said}", f"set it to {number}, as the name says", changes)]


def _total(header: GgufHeader) -> list[Finding]:
    total, entry = len(header.all_tensors), header.metadata.get(TENSORS_KEY)
    if entry is not None and entry.value_type == INT32 and entry.value == total:
        return []
    changes = GgufChanges(entries={TENSORS_KEY: Int32(total)})
    said = "missing" if entry is None else entry.value
    return [_finding(header, f"{TENSORS_KEY} is {said}, the shards hold {total}", f"set it to {total}", changes)]
