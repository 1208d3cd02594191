"""The undo record beside a file while it changes in place: how to bring back every byte, whatever was done so far."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from longrope_export.files import sync_folder

_TITLE = b"longrope-export: undo record of a change in place; keep it beside the file, any longrope command uses it\n"
_SAMPLES, _SAMPLE_BYTES = 32, 4096
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Spot:
    """Data bytes that change, at `offset` from the data start; only the last spot of a file may change its length."""

    offset: int
    before: bytes
    after: bytes


@dataclass(frozen=True)
class Change:
    """A file's change in place: another header, shifted data, and spots of other data bytes in rising order.

    The last spot reaches to the file's end. `header_before` and `header_after` differ by a multiple of the file
    system's unit in length, and the file grows in both ways or shrinks in both, never one of each.
    """

    header_before: bytes
    header_after: bytes
    spots: tuple[Spot, ...]
    size_before: int

    @property
    def shift(self) -> int:
        """Bytes by which the data move to the right."""
        return len(self.header_after) - len(self.header_before)

    @property
    def growth(self) -> int:
        """Bytes that the file gains at its end."""
        return len(self.spots[-1].after) - len(self.spots[-1].before)

    @property
    def size_after(self) -> int:
        """Bytes of the changed file."""
        return self.size_before + self.shift + self.growth


@dataclass(frozen=True)
class Record:
    """What recovery needs: the change without its result's bytes, and hashes of data blocks that only move."""

    inode: int
    size_before: int
    shift: int
    growth: int
    header_before: bytes
    header_after_size: int
    header_after_sha256: str
    spots: tuple[tuple[int, bytes], ...]
    samples: tuple[tuple[int, str], ...]


def make_record(descriptor: int, change: Change) -> Record:
    """The record of `change` for the open, still unchanged file."""
    return Record(
        inode=os.fstat(descriptor).st_ino,
        size_before=change.size_before,
        shift=change.shift,
        growth=change.growth,
        header_before=change.header_before,
        header_after_size=len(change.header_after),
        header_after_sha256=hashlib.sha256(change.header_after).hexdigest(),
        spots=tuple((spot.offset, spot.before) for spot in change.spots),
        samples=tuple(_samples(descriptor, change)),
    )


def _samples(descriptor: int, change: Change) -> list[tuple[int, str]]:
    """Evenly spaced blocks of the data before the last spot, first and last included, that no spot touches."""
    start, last = len(change.header_before), max(0, change.spots[-1].offset - _SAMPLE_BYTES)
    found = []
    for offset in sorted({last * index // (_SAMPLES - 1) for index in range(_SAMPLES)}):
        end = min(offset + _SAMPLE_BYTES, change.spots[-1].offset)
        if all(end <= spot.offset or spot.offset + len(spot.before) <= offset for spot in change.spots):
            found.append((offset, sample_hash(descriptor, start + offset, end - offset)))
    return found


def sample_hash(descriptor: int, position: int, length: int = _SAMPLE_BYTES) -> str:
    """Length and SHA-256 of the bytes at `position`."""
    return f"{length}:{hashlib.sha256(os.pread(descriptor, length, position)).hexdigest()}"


def write_record(path: Path, record: Record) -> None:
    """Write the record whole and durably; one that was cut short is told by its hash."""
    raw = _encoded(record)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        write_at(descriptor, raw, 0)
        os.fsync(descriptor)
        sync_folder(path.parent)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(descriptor)


def write_at(descriptor: int, raw: bytes, position: int) -> None:
    """Write all of `raw` at `position`."""
    view = memoryview(raw)
    while view:
        count = os.pwrite(descriptor, view, position)
        view, position = view[count:], position + count


def _encoded(record: Record) -> bytes:
    values = asdict(record)
    values["header_before"] = len(record.header_before)
    values["spots"] = [(offset, raw.hex()) for offset, raw in record.spots]
    raw = _TITLE + json.dumps(values).encode() + b"\n" + record.header_before
    return raw + hashlib.sha256(raw).digest()


def read_record(path: Path, *, limit: int) -> Record | None:
    """The record at `path`; None when it was cut short while it was written (or is longer than `limit` bytes)."""
    with path.open("rb") as file:
        raw = file.read(limit + 1)
    body, digest = raw[:-_DIGEST_BYTES], raw[-_DIGEST_BYTES:]
    if len(raw) > limit or not body.startswith(_TITLE) or hashlib.sha256(body).digest() != digest:
        return None
    text, _, header = body[len(_TITLE) :].partition(b"\n")
    return _decoded(json.loads(text), header)


def _decoded(values: dict[str, Any], header: bytes) -> Record:
    values["header_before"] = header
    values["spots"] = tuple((offset, bytes.fromhex(raw)) for offset, raw in values["spots"])
    values["samples"] = tuple((offset, text) for offset, text in values["samples"])
    return Record(**{item.name: values[item.name] for item in fields(Record)})
