"""Carrying out a change in place, so that it can be stopped between any two steps and is then finished or undone.

Each step is synced before the next: record beside the file → magic spoiled, so that no program opens the file →
data bytes → data shifted → header without its magic → magic → record removed. Going back takes the same steps in
the other direction.
"""

from __future__ import annotations

import os
from pathlib import Path

from longrope_export.converters.gguf.in_place_record import Change, Record, make_record, write_at, write_record
from longrope_export.converters.gguf.in_place_room import shift_data
from longrope_export.errors import OutputError
from longrope_export.files import sync_folder
from longrope_export.formats.gguf_header import MAGIC
from longrope_export.formats.unfinished import SPOILED_MAGIC, record_path

_PAGE = 4096


def carry_out(path: Path, descriptor: int, change: Change) -> None:
    """Apply `change` to the file at `path`, which `descriptor` alone has open.

    When the system refuses a step, every byte is brought back; raises `OutputError`.
    """
    record = make_record(descriptor, change)
    _write_record(path, record)
    try:
        _spoil_magic(descriptor, change.shift)
        for spot in change.spots:
            write_at(descriptor, spot.after, len(change.header_before) + spot.offset)
        _cut(descriptor, change.size_before + change.growth)
        shift_data(descriptor, change.shift)
        os.fsync(descriptor)
        _write_header(descriptor, change.header_after)
    except BaseException as error:
        _bring_back(path, descriptor, record, error)
        raise
    remove_record(path)


def _write_record(path: Path, record: Record) -> None:
    try:
        write_record(record_path(path), record)
    except OSError as error:
        raise OutputError(f"{path} was not changed: its undo record could not be written: {error.strerror}") from error


def remove_record(path: Path) -> None:
    """Remove the undo record of the file at `path`, durably; raises `OutputError`."""
    record = record_path(path)
    try:
        record.unlink()
        sync_folder(record.parent)
    except OSError as error:
        raise OutputError(f"{path} is in order, but {record.name} could not be removed: {error.strerror}") from error


def _bring_back(path: Path, descriptor: int, record: Record, error: BaseException) -> None:
    """Undo what was done before `error`; a system that refuses even that leaves the record for the next command."""
    try:
        roll_back(path, descriptor, record)
    except OSError as second:
        raise OutputError(
            f"{path} could not be changed and not yet be brought back ({second.strerror}); "
            f"keep {record_path(path).name} beside it, and run `longrope describe` on it when the disk is in order"
        ) from error
    if isinstance(error, OSError):
        raise OutputError(f"{path} was not changed: {error.strerror}; every byte is as it was") from error


def roll_back(path: Path, descriptor: int, record: Record) -> None:
    """Bring back the bytes from before the change of `record`, however far it came, and remove the record."""
    _spoil_magic(descriptor, 0)
    if os.fstat(descriptor).st_size == record.size_before + record.growth + record.shift:
        _spoil_magic(descriptor, -record.shift)
        shift_data(descriptor, -record.shift)
        os.fsync(descriptor)
    for offset, raw in record.spots:
        write_at(descriptor, raw, len(record.header_before) + offset)
    _cut(descriptor, record.size_before)
    _write_header(descriptor, record.header_before)
    remove_record(path)


def _spoil_magic(descriptor: int, shift: int) -> None:
    """Overwrite the magic, and where the front is cut off (`shift` < 0) also what will stand in its place."""
    # Cached pages come in groups of megabytes, and four bytes would count as a write of the whole group.
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    write_at(descriptor, SPOILED_MAGIC, 0)
    if shift < 0:
        write_at(descriptor, SPOILED_MAGIC, -shift)
    os.fsync(descriptor)


def _cut(descriptor: int, size: int) -> None:
    os.ftruncate(descriptor, size)
    os.fsync(descriptor)


def _write_header(descriptor: int, header: bytes) -> None:
    # The first page apart, for the same reason.
    write_at(descriptor, SPOILED_MAGIC + header[len(MAGIC) : _PAGE], 0)
    write_at(descriptor, header[_PAGE:], _PAGE)
    os.fsync(descriptor)
    write_at(descriptor, header[: len(MAGIC)], 0)
    os.fsync(descriptor)
