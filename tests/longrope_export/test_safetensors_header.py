"""The safetensors header reader: against the safetensors package, golden bytes, and hostile files."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from longrope_export.errors import InputFileError
from longrope_export.formats.safetensors_header import MAX_HEADER_BYTES, read_safetensors_header

Save = Callable[[bytes], Path]


def raw_file(header: dict[str, Any] | str, data: int = 0) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text.encode())) + text.encode() + bytes(data)


def tensor(start: int, end: int, shape: list[Any] | None = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@pytest.fixture
def save(tmp_path: Path) -> Save:
    def write(raw: bytes) -> Path:
        path = tmp_path / "model.safetensors"
        path.write_bytes(raw)
        return path

    return write


def test_agrees_with_the_safetensors_package(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    arrays: dict[str, Any] = {
        "a": np.ones((2, 3), np.float32),
        "b": np.arange(5, dtype=np.float16),
        "c": np.zeros((0, 2), np.int8),
    }
    save_file(arrays, path, metadata={"format": "pt", "note": "grüß"})
    header = read_safetensors_header(path)
    assert dict(header.metadata) == {"format": "pt", "note": "grüß"}
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "a": ("F32", (2, 3)), "b": ("F16", (5,)), "c": ("I8", (0, 2)),
    }  # fmt: skip
    raw = path.read_bytes()
    for name, array in arrays.items():
        entry = header.tensors[name]
        assert raw[header.data_start + entry.start : header.data_start + entry.end] == array.tobytes()
    assert header.file_size == len(raw)


def test_golden_bytes(save: Save) -> None:
    raw = bytes.fromhex("0200000000000000") + b"{}"
    header = read_safetensors_header(save(raw))
    assert (header.header_size, header.data_start, header.file_size) == (2, 10, 10)
    assert (dict(header.metadata), dict(header.tensors)) == ({}, {})


SMALL = raw_file({"__metadata__": {"k": "v"}, "a": tensor(0, 4, [1], "F32"), "b": tensor(4, 7)}, 7)


def test_truncation_at_every_byte_says_so(save: Save) -> None:
    read_safetensors_header(save(SMALL))
    for length in range(len(SMALL)):
        with pytest.raises(InputFileError, match="truncated"):
            read_safetensors_header(save(SMALL[:length]))


BAD: dict[str, tuple[bytes, str]] = {
    "header size": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(99), "at most 100,000,000"),
    "huge header": (struct.pack("<Q", (1 << 64) - 1) + b"{}", "at most 100,000,000"),
    "no brace": (raw_file(" {}"), "does not begin"),
    "not JSON": (raw_file("{"), "not JSON"),
    "not UTF-8": (struct.pack("<Q", 3) + b"{\xff}", "not JSON"),
    "deep": (raw_file('{"a":' * 50_000), "not JSON"),
    "long for its file": (raw_file('{"a":' * 60_000), "300,000 bytes, too many for a file of 300,008"),
    "long number": (raw_file('{"a":' + "1" * 5000 + "}"), "not JSON"),
    "duplicate tensor": (raw_file('{"a":1,"a":1}'), "duplicate key"),
    "duplicate metadata": (raw_file('{"__metadata__":{"k":"1","k":"2"}}'), "duplicate key"),
    "metadata type": (raw_file({"__metadata__": {"k": 1}}), "strings to strings"),
    "metadata list": (raw_file({"__metadata__": []}), "strings to strings"),
    "tensor type": (raw_file({"a": 1}), "must have dtype"),
    "missing field": (raw_file({"a": {"dtype": "U8", "shape": [0]}}), "must have dtype"),
    "extra field": (raw_file({"a": {**tensor(0, 1), "x": 1}}, 1), "must have dtype"),
    "dtype": (raw_file({"a": tensor(0, 1, dtype="X8")}, 1), "unknown dtype 'X8'"),
    "dtype list": (raw_file({"a": tensor(0, 1, dtype=["U8"])}, 1), "unknown dtype"),
    "shape text": (raw_file({"a": tensor(0, 1, ["1"])}, 1), "impossible shape"),
    "shape float": (raw_file({"a": tensor(0, 1, [1.0])}, 1), "impossible shape"),
    "shape bool": (raw_file({"a": tensor(0, 1, [True])}, 1), "impossible shape"),
    "negative": (raw_file({"a": tensor(0, 1, [-1])}, 1), "impossible shape"),
    "overflow": (raw_file({"a": tensor(0, 1, [1 << 40, 1 << 40])}, 1), "impossible shape"),
    "three offsets": (raw_file({"a": {**tensor(0, 1), "data_offsets": [0, 1, 2]}}, 1), "impossible offsets"),
    "backwards": (raw_file({"a": {**tensor(0, 1), "data_offsets": [1, 0]}}, 1), "impossible offsets"),
    "wrong size": (raw_file({"a": tensor(0, 5, [1], "F32")}, 5), "has 5 bytes, its shape needs 4"),
    "gap": (raw_file({"a": tensor(0, 1), "b": tensor(2, 3)}, 3), "'b' begins at 2, expected 1"),
    "overlap": (raw_file({"a": tensor(0, 2), "b": tensor(1, 3)}, 3), "'b' begins at 1, expected 2"),
    "not at zero": (raw_file({"a": tensor(1, 2)}, 2), "begins at 1, expected 0"),
    "trailing bytes": (raw_file({"a": tensor(0, 1)}, 3), "2 bytes after its tensors"),
    "data missing": (raw_file({"a": tensor(0, 9)}, 3), "its tensors need 9 bytes, 3 are there"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_rule_refuses_its_file(name: str, save: Save) -> None:
    raw, message = BAD[name]
    with pytest.raises(InputFileError, match=message):
        read_safetensors_header(save(raw))


@given(flips=st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_raises_only_our_error(flips: list[tuple[int, int]], save: Save) -> None:
    raw = bytearray(SMALL)
    for position, value in flips:
        raw[position] = value
    try:
        header = read_safetensors_header(save(bytes(raw)))
    except InputFileError:
        return
    assert all(header.data_start + entry.end <= header.file_size for entry in header.tensors.values())


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="No such file"):
        read_safetensors_header(tmp_path / "absent.safetensors")
    with pytest.raises(InputFileError, match="not a regular file"):
        read_safetensors_header(tmp_path)
