"""Entries in the header of a safetensors file where it is: no tensor byte is read, copied or moved within its data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from longrope_export.converters.copying import copy_range
from longrope_export.converters.gguf.in_place_change import carry_out
from longrope_export.converters.gguf.in_place_guard import check_alone, opened_alone
from longrope_export.converters.gguf.in_place_record import Change, Spot
from longrope_export.converters.gguf.in_place_room import room_unit
from longrope_export.converters.safetensors import header_bytes
from longrope_export.converters.safetensors_undo import original_header, undo_entry
from longrope_export.errors import InputFileError, OutputError
from longrope_export.files import atomic_output, output_errors, sync_folder
from longrope_export.formats.gguf_header import read_range
from longrope_export.formats.safetensors_header import SafetensorsHeader, most_header_bytes, read_safetensors_header
from longrope_export.formats.unfinished import refuse_unfinished

How = Literal["room", "inserted", "removed", "copied"]
_ALIGNMENT = 8
_LENGTH_BYTES = 8


def add_safetensors_metadata(path: str | os.PathLike[str], entries: Mapping[str, str], *, dry_run: bool = False) -> How:
    """Add `entries` to (or replace them in) the `__metadata__` of the file at `path` itself, and what undoes it.

    Uses the spaces that the header ends with ("room"), else blocks inserted at the front ("inserted", on ext4 and XFS),
    else one streaming copy that takes the file's place ("copied"). Stopped half-way, the next longrope command that
    names the file or its folder undoes or finishes it. `dry_run` checks everything and changes nothing. Raises
    `InputFileError` for a malformed file, `OutputError` when another program has it open, it has other names, or the
    system refuses.
    """

    def header_after(header: SafetensorsHeader, unit: int) -> bytes:
        raw = header_bytes(header, {**entries, **undo_entry(header, _raw(header))})
        return raw.ljust(header.header_size + _rounded(len(raw) - header.header_size, unit))

    return _changed(Path(path), header_after, dry_run=dry_run)


def restore_safetensors(path: str | os.PathLike[str], *, dry_run: bool = False) -> How:
    """Bring back the bytes that the file had before `add_safetensors_metadata`; "removed": blocks were cut off.

    Raises as that, and `InputFileError` when there is nothing to undo.
    """
    return _changed(Path(path), lambda header, _: original_header(header), dry_run=dry_run)


def _changed(source: Path, header_after: Callable[[SafetensorsHeader, int], bytes], *, dry_run: bool) -> How:
    refuse_unfinished(source)
    before = _identity(source.stat()) if source.exists() else None
    header = read_safetensors_header(source)
    check_alone(source)
    unit = _unit(source)
    raw = header_after(header, unit or _ALIGNMENT)
    _check_size(header, raw)
    grown = len(raw) - header.header_size
    if grown and (not unit or grown % unit):
        if not dry_run:
            _replace(header, raw)
        return "copied"
    change = _change(header, raw)
    with opened_alone(source) as descriptor:
        if _identity(os.fstat(descriptor)) != before:
            raise InputFileError(f"{source} changed while it was read; run again")
        if not dry_run:
            carry_out(source, descriptor, change)
    return "inserted" if grown > 0 else "removed" if grown else "room"


def _unit(path: Path) -> int:
    """Bytes in which the file system inserts room; 0 where it cannot."""
    try:
        return room_unit(path, _ALIGNMENT)
    except OutputError:
        return 0


def _rounded(missing: int, unit: int) -> int:
    """Spaces, which the format allows behind the header's JSON, fill what room is too much."""
    return -(-missing // unit) * unit if missing > 0 else 0


def _check_size(header: SafetensorsHeader, raw: bytes) -> None:
    size = header.file_size - header.header_size + len(raw)
    if len(raw) > most_header_bytes(size):
        raise OutputError(f"{header.path} has too long a header to take more in; write a copy instead")


def _raw(header: SafetensorsHeader) -> bytes:
    return read_range(header.path, _LENGTH_BYTES, header.data_start)


def _change(header: SafetensorsHeader, raw: bytes) -> Change:
    old = read_range(header.path, 0, header.data_start)
    nothing = Spot(header.file_size - header.data_start, b"", b"")
    return Change(old, len(raw).to_bytes(_LENGTH_BYTES, "little") + raw, (nothing,), header.file_size)


def _replace(header: SafetensorsHeader, raw: bytes) -> None:
    source = header.path
    with output_errors(source), tempfile.TemporaryDirectory(dir=source.parent, prefix=".metadata-") as name:
        written = Path(name) / source.name
        with source.open("rb", buffering=0) as original, atomic_output(written) as file:
            file.write(len(raw).to_bytes(_LENGTH_BYTES, "little") + raw)
            copy_range(original, file, header.data_start, header.file_size - header.data_start)
        written.chmod(source.stat().st_mode & 0o7777)
        written.replace(source)
        sync_folder(source.parent)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_ino, status.st_size, status.st_mtime_ns)
