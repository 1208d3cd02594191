"""Mending a file whose change in place was cut short: undone, or found to be finished, or refused by name."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Literal

from longrope_export.converters.gguf.in_place_change import remove_record, roll_back
from longrope_export.converters.gguf.in_place_guard import opened_alone
from longrope_export.converters.gguf.in_place_record import Record, read_record, sample_hash
from longrope_export.errors import InputFileError, OutputError
from longrope_export.formats.gguf_header import MAGIC
from longrope_export.formats.unfinished import SPOILED_MAGIC, record_path

Outcome = Literal["finished", "undone"]
_ROOM = 16 << 20
_LENGTH_BYTES = 8


def recover(path: Path) -> Outcome | None:
    """Finish or undo the change in place that was cut short for the file at `path`; None when there is none.

    Decided from the record beside the file, its inode, its size and hashes of sampled blocks. Raises `OutputError` when
    the file is in use, `InputFileError` when record and file do not belong together.
    """
    record = record_path(path)
    if not record.is_file():
        return None
    with opened_alone(path, _not_now) as descriptor:
        # A change that was still under way has ended meanwhile.
        return _mend(path, descriptor, record) if record.exists() else None


def _mend(path: Path, descriptor: int, place: Path) -> Outcome:
    record = _read(path, place, limit=2 * os.fstat(descriptor).st_size + _ROOM)
    beginning = os.pread(descriptor, len(MAGIC), 0)
    intact = record is not None and beginning in _beginnings(record)
    if record is None:
        # a safetensors file has no magic to tell
        spoiled = beginning in (SPOILED_MAGIC, bytes(len(MAGIC)))
        if spoiled or (beginning != MAGIC and path.suffix != ".safetensors"):
            raise _strange(path, "the record is damaged")
        # The magic is spoiled only after the record is whole on the disk.
        remove_record(path)
        return "undone"
    if os.fstat(descriptor).st_ino != record.inode:
        raise _strange(path, "the record is about another file that had this name")
    if intact:
        outcome = _intact_outcome(path, descriptor, record)
        remove_record(path)
        return outcome
    _check_data(path, descriptor, record)
    try:
        roll_back(path, descriptor, record)
    except OSError as error:
        raise _not_now(path, str(error.strerror)) from error
    return "undone"


def _read(path: Path, place: Path, *, limit: int) -> Record | None:
    try:
        return read_record(place, limit=limit)
    except OSError as error:
        raise _not_now(path, f"{place.name}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError):
        raise _strange(path, "the record is not of this version") from None


def _beginnings(record: Record) -> tuple[bytes, bytes]:
    """The file's first four bytes before and after the change: GGUF's magic, or the length of a safetensors header."""
    if record.header_before.startswith(MAGIC):
        return MAGIC, MAGIC
    length = record.header_after_size - _LENGTH_BYTES
    return record.header_before[: len(MAGIC)], length.to_bytes(_LENGTH_BYTES, "little")[: len(MAGIC)]


def _intact_outcome(path: Path, descriptor: int, record: Record) -> Outcome:
    size = os.fstat(descriptor).st_size
    header = os.pread(descriptor, max(len(record.header_before), record.header_after_size), 0)
    if size == record.size_before and header.startswith(record.header_before):
        return "undone"
    after = hashlib.sha256(header[: record.header_after_size]).hexdigest()
    if size == record.size_before + record.growth + record.shift and after == record.header_after_sha256:
        return "finished"
    raise _strange(path, "the file was changed since")


def _check_data(path: Path, descriptor: int, record: Record) -> None:
    """The data must be where the file's size says; a power cut in the middle of the shift may have torn them."""
    magic = os.pread(descriptor, len(MAGIC), 0)
    # Half-written ones too; zeros are what inserting room leaves.
    if not all(byte in (0, *known) for byte, *known in zip(magic, *_beginnings(record), SPOILED_MAGIC, strict=False)):
        raise _strange(path, "the file was changed since")
    size = os.fstat(descriptor).st_size
    ends = sorted((record.size_before, record.size_before + record.growth))
    shifted = size == ends[0] + ends[1] - record.size_before + record.shift
    if not shifted and not ends[0] <= size <= ends[1]:
        raise _strange(path, f"the file has {size:,} bytes, which is no state of that change")
    start = len(record.header_before) + (record.shift if shifted else 0)
    for offset, expected in record.samples:
        if sample_hash(descriptor, start + offset, int(expected.partition(":")[0])) != expected:
            raise _strange(path, f"its data at byte {start + offset:,} are not what they were")


def _not_now(path: Path, reason: str) -> OutputError:
    return OutputError(f"{path}: a change in place was cut short and cannot be undone now: {reason}")


def _strange(path: Path, reason: str) -> InputFileError:
    record = record_path(path).name
    return InputFileError(
        f"{path}: a change in place was cut short, but {reason}; if this is a fresh copy of the file, remove {record}, "
        "else get one"
    )
