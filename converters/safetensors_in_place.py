"""Entries in the header of a safetensors file where it is: no tensor byte is read, copied or moved within its data."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from longrope_export.converters.gguf.in_place_change import carry_out
from longrope_export.converters.gguf.in_place_guard import check_alone, opened_alone
from longrope_export.converters.gguf.in_place_record import Change, Spot
from longrope_export.converters.gguf.in_place_room import room_unit
from longrope_export.converters.safetensors import header_bytes, write_safetensors_metadata
from longrope_export.errors import InputFileError, OutputError
from longrope_export.files import output_errors, sync_folder
from longrope_export.formats.gguf_header import read_range
from longrope_export.formats.safetensors_header import SafetensorsHeader, read_safetensors_header
from longrope_export.formats.unfinished import refuse_unfinished

How = Literal["room", "inserted", "copied"]
_ALIGNMENT = 8


def add_safetensors_metadata(path: str | os.PathLike[str], entries: Mapping[str, str]) -> How:
    """Add `entries` to (or replace them in) the `__metadata__` of the file at `path` itself.

    Uses the spaces that the header ends with ("room"), else blocks inserted at the front ("inserted", on ext4 and XFS),
    else one streaming copy that takes the file's place ("copied"). Stopped half-way, the next longrope command that
    names the file or its folder undoes or finishes it. Raises `InputFileError` for a malformed file, `OutputError` when
    another program has it open, it has other names, or the system refuses.
    """
    source = Path(path)
    refuse_unfinished(source)
    before = _identity(source.stat()) if source.exists() else None
    header = read_safetensors_header(source)
    check_alone(source)
    raw = header_bytes(header, entries)
    unit = 0
    if len(raw) > header.header_size:
        try:
            unit = room_unit(source, _ALIGNMENT)
        except OutputError:
            _replace(source, entries)
            return "copied"
    change = _change(header, raw, unit)
    with opened_alone(source) as descriptor:
        if _identity(os.fstat(descriptor)) != before:
            raise InputFileError(f"{source} changed while it was read; run again")
        carry_out(source, descriptor, change)
    return "inserted" if change.shift else "room"


def _change(header: SafetensorsHeader, raw: bytes, unit: int) -> Change:
    """Room comes in multiples of `unit`; spaces, which the format allows behind the header's JSON, fill it."""
    missing = len(raw) - header.header_size
    size = header.header_size + (-(-missing // unit) * unit if missing > 0 else 0)
    old = read_range(header.path, 0, header.data_start)
    nothing = Spot(header.file_size - header.data_start, b"", b"")
    return Change(old, size.to_bytes(8, "little") + raw.ljust(size), (nothing,), header.file_size)


def _replace(source: Path, entries: Mapping[str, str]) -> None:
    with output_errors(source), tempfile.TemporaryDirectory(dir=source.parent, prefix=".metadata-") as name:
        written = Path(name) / source.name
        write_safetensors_metadata(source, written, entries)
        written.replace(source)
        sync_folder(source.parent)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_ino, status.st_size, status.st_mtime_ns)
