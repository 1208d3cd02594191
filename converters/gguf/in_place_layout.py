"""The new header and the changed data bytes of a GGUF file whose other tensors stay where they are."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from longrope_export.converters.gguf.encode import encode_entry, encode_head, encode_tensor_info
from longrope_export.converters.gguf.in_place_room import refusal
from longrope_export.converters.gguf.in_place_undo import MAX_UNDO_BYTES, Original, Span, filled, undo_entry
from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.formats.gguf_header import MAX_ENTRIES, MAX_TENSORS, GgufHeader, TensorInfo, align

_F32 = 0


@dataclass(frozen=True)
class Vector:
    """A new F32 tensor of one row and its offset from the data start."""

    name: str
    values: tuple[float, ...]
    offset: int

    @property
    def raw(self) -> bytes:
        """Its stored bytes."""
        return struct.pack(f"<{len(self.values)}f", *self.values)


@dataclass(frozen=True)
class Placement:
    """Where the new vectors go: `slots` by the name of the old tensor whose place they take, the others at the end.

    `kept` tensors are followed by `tail` bytes that begin at that offset from the data start.
    """

    kept: tuple[TensorInfo, ...]
    slots: dict[str, Vector]
    appended: tuple[Vector, ...]
    tail: int


def place_vectors(header: GgufHeader, changes: GgufChanges) -> Placement:
    """Give every new vector a place; tensors in the middle can only be replaced by vectors of the same length.

    llama.cpp wants tensors without gaps. Raises `OutputError` when a dropped tensor would leave one.
    """
    replaced = changes.dropped | set(changes.vectors)
    infos = list(header.tensors)
    while infos and infos[-1].name in replaced:
        infos.pop()
    waiting = dict(changes.vectors)
    slots: dict[str, Vector] = {}
    for info in infos:
        if info.name in replaced:
            name = info.name if info.name in waiting else next(iter(waiting), None)
            if name is None or info.ggml_type != _F32 or info.shape != (len(waiting[name]),):
                raise refusal(header.path, f"its tensor {info.name} stands between others and cannot go")
            slots[info.name] = Vector(name, waiting.pop(name), info.offset)
    tail = infos[-1].offset + infos[-1].size if infos else 0
    return Placement(tuple(infos), slots, _appended(waiting, tail, header.alignment), tail)


def _appended(waiting: dict[str, tuple[float, ...]], tail: int, alignment: int) -> tuple[Vector, ...]:
    vectors = []
    offset = align(tail, alignment)
    for name, values in waiting.items():
        vectors.append(Vector(name, values, offset))
        offset += align(4 * len(values), alignment)
    return tuple(vectors)


def spot_bytes(header: GgufHeader, placement: Placement, original: Original) -> tuple[tuple[int, bytes], ...]:
    """The new bytes of the original's spots (see `Original`): never fewer, so that the file only grows."""
    slots = sorted(placement.slots.values(), key=lambda vector: vector.offset)
    tail = b""
    for vector in placement.appended:
        tail = tail.ljust(vector.offset - placement.tail, b"\0") + vector.raw
    end = align(placement.tail + len(tail), header.alignment) - placement.tail
    tail = tail.ljust(end, b"\0")
    old = original.spots[-1][1]
    return (*((vector.offset, vector.raw) for vector in slots), (placement.tail, tail + old[len(tail) :]))


def new_header(
    header: GgufHeader, changes: GgufChanges, placement: Placement, original: Original, *, unit: int, least: int
) -> bytes:
    """The header of `header`'s file with `changes`: `least` bytes, or longer than the original by multiples of `unit`.

    Whatever the changes leave over is taken up by the undo array, so that the tensor table ends where data begin.
    """
    parts = _Parts(original.header)
    count = len(placement.kept) + len(placement.appended)
    gone = changes.removed | set(changes.entries)
    entries = [entry for key, entry in header.metadata.items() if key not in gone]
    total = len(entries) + len(changes.entries) + 1
    if total > MAX_ENTRIES or count > MAX_TENSORS:
        raise refusal(header.path, "it has too many keys or tensors")
    parts.add(encode_head(header.version, count, total))
    for entry in entries:
        parts.keep(entry.start, entry.end)
    for key, value in changes.entries.items():
        parts.add(encode_entry(key, value))
    front, table = parts, _table(header, placement, original)
    undo = undo_entry(original, front.spans + [table.from_end(span) for span in table.spans])
    needed = front.length + len(undo) + table.length
    grown = -(-max(0, needed - len(original.header)) // unit) * unit
    length = max(least, len(original.header) + grown)
    room = length - front.length - table.length
    if len(undo) > MAX_UNDO_BYTES:
        raise refusal(header.path, "what it would have to remember is too large")
    return front.joined() + filled(undo, room) + table.joined()


def _table(header: GgufHeader, placement: Placement, original: Original) -> _Parts:
    parts = _Parts(original.header)
    for info in placement.kept:
        vector = placement.slots.get(info.name)
        if vector is None:
            parts.keep(info.start, info.end)
        else:
            parts.add(_row(vector))
    for vector in placement.appended:
        parts.add(_row(vector))
    return parts


def _row(vector: Vector) -> bytes:
    return encode_tensor_info(vector.name, (len(vector.values),), _F32, vector.offset)


class _Parts:
    """Bytes in order: some new, some kept from the original header, whose spans are remembered."""

    def __init__(self, original: bytes) -> None:
        self.original, self.length = original, 0
        self.blocks: list[bytes] = []
        self.spans: list[Span] = []

    def add(self, block: bytes) -> None:
        self.blocks.append(block)
        self.length += len(block)

    def keep(self, start: int, end: int) -> None:
        last = self.spans[-1] if self.spans else None
        if last and last.end == start and last.position + last.end - last.start == self.length:
            self.spans[-1] = Span(last.start, end, last.position)
        else:
            self.spans.append(Span(start, end, self.length))
        self.add(self.original[start:end])

    def from_end(self, span: Span) -> Span:
        return Span(span.start, span.end, span.position - self.length)

    def joined(self) -> bytes:
        return b"".join(self.blocks)
