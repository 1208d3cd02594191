"""The array `longrope_export.undo` of a file that was patched in place: what brings its original bytes back.

It holds only what the patch replaced: the rest of the original header still stands in the new one, and the
array says where. Zeros behind it take up the inserted room to the byte, because llama.cpp takes the first
aligned position behind the tensor table for the tensors' data.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.formats.gguf_header import ARRAY, MAGIC, UINT8, GgufHeader, read_range

UNDO_KEY = "longrope_export.undo"
# Parsed JSON can take sixty times its text.
MAX_UNDO_BYTES = 1 << 18
_MAX_ARRAY_BYTES = 1 << 24
_FORMAT = 1


@dataclass(frozen=True)
class Original:
    """What a file was before its first change in place.

    `header` are its bytes up to the tensor data, `size` its bytes in all. `spots` are the data bytes that the change
    replaced, at offsets from the data start and in rising order; the last one reaches to the end of the file.
    """

    header: bytes
    size: int
    spots: tuple[tuple[int, bytes], ...]


@dataclass(frozen=True)
class Span:
    """Bytes `start` to `end` of the original header that stand at `position` in the new one (from its end if < 0)."""

    start: int
    end: int
    position: int


def undo_entry(original: Original, spans: list[Span]) -> bytes:
    """The whole key-value pair without filler; `filled` makes it longer."""
    pieces: list[object] = []
    done = 0
    for span in sorted(spans, key=lambda item: item.start):
        pieces += [original.header[done : span.start].hex(), [span.position, span.end - span.start]]
        done = span.end
    pieces.append(original.header[done:].hex())
    payload = {
        "format": _FORMAT,
        "header": len(original.header),
        "sha256": _digest(original),
        "size": original.size,
        "pieces": [piece for piece in pieces if piece],
        "spots": [[offset, raw.hex()] for offset, raw in original.spots],
    }
    return _framed(json.dumps(payload, separators=(",", ":")).encode())


def _digest(original: Original) -> str:
    rest = json.dumps([original.size, [[offset, raw.hex()] for offset, raw in original.spots]])
    return hashlib.sha256(original.header + rest.encode()).hexdigest()


def filled(entry: bytes, length: int) -> bytes:
    """`entry` made `length` bytes long by zeros inside its array."""
    return _framed(entry[len(_framed(b"")) :].ljust(length - len(_framed(b"")), b"\0"))


def _framed(elements: bytes) -> bytes:
    key = UNDO_KEY.encode()
    return struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", ARRAY, UINT8, len(elements)) + elements


def read_original(header: GgufHeader) -> Original | None:
    """What the file of `header` was before it was patched in place; None when it was not.

    Raises `InputFileError` when the array is damaged, or the file was changed by another tool since.
    """
    entry = header.metadata.get(UNDO_KEY)
    if entry is None:
        return None
    try:
        if entry.array_type != UINT8 or entry.array_length > _MAX_ARRAY_BYTES:
            raise ValueError("not a UINT8 array")
        text = read_range(header.path, entry.elements, entry.end).rstrip(b"\0")
        if len(text) > MAX_UNDO_BYTES:
            raise ValueError("too long")
        return _validated(header, json.loads(text))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputFileError(
            f"{header.path}: its key {UNDO_KEY} is damaged or not about this file; another tool has changed the file "
            "since it was patched in place"
        ) from None


def _validated(header: GgufHeader, payload: dict[str, Any]) -> Original:
    if payload["format"] != _FORMAT:
        raise ValueError("unknown format")
    raw = _original_header(read_range(header.path, 0, header.data_start), payload)
    size = _count(payload["size"])
    spots = tuple((_count(offset), bytes.fromhex(text)) for offset, text in payload["spots"])
    _check_spots(header, size - len(raw), spots)
    original = Original(raw, size, spots)
    if not raw.startswith(MAGIC) or _digest(original) != payload["sha256"]:
        raise ValueError("another header")
    return original


def _original_header(current: bytes, payload: dict[str, Any]) -> bytes:
    """The pieces in order; no longer than the current header, whatever they say."""
    parts: list[bytes] = []
    left = _count(payload["header"])
    if not 0 < left <= len(current):
        raise ValueError("impossible length")
    for piece in payload["pieces"]:
        part = bytes.fromhex(piece) if isinstance(piece, str) else _part(current, *piece)
        left -= len(part)
        if not part or left < 0:
            raise ValueError("pieces of another length")
        parts.append(part)
    if left:
        raise ValueError("pieces of another length")
    return b"".join(parts)


def _count(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise ValueError("not a size")
    return value


def _part(current: bytes, position: int, length: int) -> bytes:
    start = position if position >= 0 else len(current) + position
    if not 0 <= start < start + length <= len(current):
        raise ValueError("a piece outside the header")
    return current[start : start + length]


def _check_spots(header: GgufHeader, data_size: int, spots: tuple[tuple[int, bytes], ...]) -> None:
    end = 0
    for offset, raw in spots:
        if not end <= offset <= offset + len(raw) <= data_size:
            raise ValueError("a spot outside the data")
        end = offset + len(raw)
    if not spots or end != data_size or spots[-1][0] > header.file_size - header.data_start:
        raise ValueError("the data have another end")
