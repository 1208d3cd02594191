"""Patching a GGUF file where it is, whatever its size: room is inserted for a longer header, and no tensor moves.

`unpatch` takes the room back; what it needs is in the patched file itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from longrope_export.converters.gguf.checks import check_patchable
from longrope_export.converters.gguf.in_place_change import carry_out
from longrope_export.converters.gguf.in_place_guard import check_alone, opened_alone
from longrope_export.converters.gguf.in_place_layout import new_header, place_vectors, spot_bytes
from longrope_export.converters.gguf.in_place_record import Change, Spot
from longrope_export.converters.gguf.in_place_room import refusal, room_unit
from longrope_export.converters.gguf.in_place_undo import Original, read_original
from longrope_export.converters.gguf.rewrite import GgufChanges, shard_changes
from longrope_export.converters.gguf.scaling_keys import scaling_changes
from longrope_export.errors import InputFileError
from longrope_export.formats.gguf_header import GgufHeader, parse_gguf_header, read_gguf_header, read_range
from longrope_export.formats.gguf_shards import read_gguf, shard_count, shard_paths
from longrope_export.scaling import RopeScaling

# More bytes than this behind the last tensor are not padding, and not ours to remember.
_MAX_TAIL = 1 << 16


@dataclass(frozen=True)
class InPlaceResult:
    """What was done to a file, or would be: bytes that the data moved by, bytes gained at the end, the new size."""

    shift: int
    growth: int
    size: int
    lossy: tuple[str, ...] = ()


def patch_in_place(
    path: str | os.PathLike[str], scaling: RopeScaling, *, allow_lossy: bool = False, dry_run: bool = False
) -> InPlaceResult:
    """Embed `scaling` in the GGUF file at `path` itself; `dry_run` checks everything and writes nothing.

    A file that was patched in place before is patched as if it had not been. Of a split model the first shard changes
    alone, whichever is named: keys and factors stand there, and llama.cpp reads the sum of tensors there. Raises what
    `patch_gguf` raises, and `OutputError` when the file is in use, has other names, or the file system cannot insert
    room.
    """
    lossy: list[str] = []

    def plan(header: GgufHeader) -> Change:
        # read again only where there are others: a large vocabulary takes time
        whole = replace(header, others=read_gguf(header.path).others) if shard_count(header) > 1 else header
        lossy.extend(check_patchable(whole, scaling, allow_lossy=allow_lossy))
        return _planned_patch(whole, lambda origin: scaling_changes(origin, scaling))

    change = _changed(Path(path), plan, dry_run=dry_run)
    return InPlaceResult(change.shift, change.growth, change.size_after, tuple(lossy))


def unpatch_in_place(path: str | os.PathLike[str], *, dry_run: bool = False) -> InPlaceResult:
    """Bring back the bytes that the GGUF file at `path` had before it was patched in place.

    Raises `InputFileError` when it was not, or was changed by another tool since, and `OutputError`.
    """
    change = _changed(Path(path), _planned_unpatch, dry_run=dry_run)
    return InPlaceResult(change.shift, change.growth, change.size_after)


def original_of(header: GgufHeader) -> Original:
    """What the file of `header` was before it was patched in place; raises `InputFileError` when it was not."""
    original = read_original(header)
    if original is None:
        raise InputFileError(f"{header.path} was not patched in place; it carries nothing to undo")
    return original


def _changed(path: Path, plan: Callable[[GgufHeader], Change], *, dry_run: bool) -> Change:
    """Read and plan first, then take the file for this process alone, and make sure that it is still the same.

    Of several shards the first is changed, whichever `path` is.
    """
    before = _identity(path.stat()) if path.exists() else None
    header = read_gguf_header(path)
    count = shard_count(header)
    if count > 1 and path != (first := shard_paths(path, count)[0]):
        return _changed(first, plan, dry_run=dry_run)
    check_alone(path)
    change = plan(header)
    with opened_alone(path) as descriptor:
        if _identity(os.fstat(descriptor)) != before:
            raise InputFileError(f"{path} changed while it was read; run again")
        if not dry_run:
            carry_out(path, descriptor, change)
    return change


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _planned_patch(header: GgufHeader, changes_of: Callable[[GgufHeader], GgufChanges]) -> Change:
    unit = room_unit(header.path, header.alignment)
    known = read_original(header)
    origin = parse_gguf_header(header.path, known.header, known.size) if known else header
    changes = _first_changes(replace(origin, others=header.others), changes_of(origin))
    placement = place_vectors(origin, changes)
    places = [(vector.offset, len(vector.raw)) for vector in placement.slots.values()]
    current = _current_spots(header, [*places, (placement.tail, 0)])
    original = known or Original(_header_bytes(header), header.file_size, tuple(current))
    if [(offset, len(raw)) for offset, raw in original.spots[:-1]] != places or original.spots[-1][0] != placement.tail:
        raise refusal(header.path, "it was patched with other tensors before")
    after = spot_bytes(origin, placement, original)
    raw = new_header(origin, changes, placement, original, unit=unit, least=header.data_start)
    return _change(header, raw, current, after)


def _first_changes(header: GgufHeader, changes: GgufChanges) -> GgufChanges:
    """What the first shard gets; the others must not hold what would have to go."""
    gone = changes.dropped | changes.vectors.keys()
    for shard in header.others:
        if names := [info.name for info in shard.tensors if info.name in gone]:
            raise refusal(header.path, f"{shard.path.name} holds the tensor {names[0]}, which would have to go")
    return shard_changes(header, changes)[0]


def _planned_unpatch(header: GgufHeader) -> Change:
    room_unit(header.path, header.alignment)
    original = original_of(header)
    current = _current_spots(header, [(offset, len(raw)) for offset, raw in original.spots])
    return _change(header, original.header, current, original.spots)


def _change(
    header: GgufHeader, raw: bytes, current: list[tuple[int, bytes]], after: tuple[tuple[int, bytes], ...]
) -> Change:
    spots = tuple(Spot(offset, old, new) for (offset, old), (_, new) in zip(current, after, strict=True))
    change = Change(_header_bytes(header), raw, spots, header.file_size)
    if change.shift * change.growth < 0 or change.shift % header.alignment:
        raise refusal(header.path, "its tensors would not stay where they are")
    return change


def _header_bytes(header: GgufHeader) -> bytes:
    return read_range(header.path, 0, header.data_start)


def _current_spots(header: GgufHeader, places: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """The file's bytes at offsets and lengths from the data start; the last one reaches to the file's end."""
    start, tail = header.data_start, places[-1][0]
    if header.file_size - start - tail > _MAX_TAIL:
        raise refusal(header.path, "too many bytes follow its last tensor")
    spots = [(offset, read_range(header.path, start + offset, start + offset + size)) for offset, size in places[:-1]]
    return [*spots, (tail, read_range(header.path, start + tail, header.file_size))]
