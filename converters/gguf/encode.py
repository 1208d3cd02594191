"""Encoding single GGUF records: one key-value pair, one row of the tensor table, the head of the file."""

from __future__ import annotations

import struct

from longrope_export.formats.gguf_header import ARRAY, BOOL, FLOAT32, INT32, MAGIC, STRING, UINT8, UINT16, UINT32


class Int32(int):
    """A whole number that is stored as INT32."""


class UInt16(int):
    """A whole number that is stored as UINT16."""


# class → (value type, struct format); llama.cpp reads each key in one type only
_INTEGERS = {Int32: (INT32, "i"), UInt16: (UINT16, "H"), int: (UINT32, "I")}
_HEAD = struct.Struct("<4sIQQ")


def encode_head(version: int, tensor_count: int, entry_count: int) -> bytes:
    """The 24 bytes at the start of a GGUF file."""
    return _HEAD.pack(MAGIC, version, tensor_count, entry_count)


def encode_string(text: str) -> bytes:
    """Length (u64) and UTF-8 bytes."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def encode_entry(key: str, value: str | int | float) -> bytes:
    """One key-value pair: str as STRING, bool as BOOL, int as UINT32 (or as its class says), float as FLOAT32;
    raises `struct.error` when out of range.
    """
    head = encode_string(key)
    if isinstance(value, str):
        return head + struct.pack("<I", STRING) + encode_string(value)
    if isinstance(value, bool):
        return head + struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        kind, layout = _INTEGERS[type(value)]
        return head + struct.pack(f"<I{layout}", kind, value)
    return head + struct.pack("<If", FLOAT32, value)


def filler_entry(key: str, length: int) -> bytes:
    """A UINT8 array of `length` zeros."""
    return encode_string(key) + struct.pack("<IIQ", ARRAY, UINT8, length) + bytes(length)


def encode_tensor_info(name: str, shape: tuple[int, ...], ggml_type: int, offset: int) -> bytes:
    """One row of the tensor table; `shape` in ggml's order (fastest dimension first), `offset` from the data
    start.
    """
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return encode_string(name) + dimensions + struct.pack("<IQ", ggml_type, offset)
