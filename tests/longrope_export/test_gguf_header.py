"""The GGUF header reader: against gguf-py's writer and reader, golden bytes, and hostile files."""

from __future__ import annotations

import itertools
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longrope_export.errors import InputFileError
from longrope_export.formats.gguf_header import ARRAY, STRING, UINT32, read_gguf_header


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, value_type: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", value_type) + value


def array(key: str, element_type: int, count: int, elements: bytes) -> bytes:
    return entry(key, ARRAY, struct.pack("<IQ", element_type, count) + elements)


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def info(name: str | bytes, shape: tuple[int, ...], ggml_type: int, offset: int) -> bytes:
    dimensions = b"".join(struct.pack("<Q", size) for size in shape)
    return text(name) + u32(len(shape)) + dimensions + struct.pack("<IQ", ggml_type, offset)


def gguf(
    entries: list[bytes],
    infos: list[bytes],
    data: int = 0,
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensors, keys = counts or (len(infos), len(entries))
    raw = b"GGUF" + u32(version) + struct.pack("<QQ", tensors, keys) + b"".join(entries) + b"".join(infos)
    padding = -len(raw) % alignment if infos else 0
    return raw + bytes(padding) + bytes(data)


def small() -> bytes:
    """One string, one array of each kind, two tensors."""
    entries = [
        entry("general.architecture", STRING, text("llama")),
        array("tokens", STRING, 3, text("a") + text("") + text("ßc")),
        array("ids", 5, 2, struct.pack("<ii", -1, 7)),
    ]
    return gguf(entries, [info("a", (3, 2), 0, 0), info("b", (32,), 8, 32)], 32 + 34)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(raw: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(raw)
        return path

    return write


Save = Callable[[bytes], Path]


def test_golden_bytes_of_the_smallest_file(save: Save) -> None:
    raw = bytes.fromhex("47475546 03000000 0000000000000000 0000000000000000")
    header = read_gguf_header(save(raw))
    assert (header.version, header.alignment, header.file_size) == (3, 32, 24)
    assert (header.kv_start, header.kv_end, header.infos_end, header.data_start) == (24, 24, 24, 32)
    assert not header.metadata
    assert header.tensors == ()


def test_golden_bytes_of_one_key_and_one_tensor(save: Save) -> None:
    raw = bytes.fromhex(
        "47475546 03000000 0100000000000000 0100000000000000"
        "0100000000000000 6b 04000000 2a000000"  # "k": UINT32 42
        "0200000000000000 7474 01000000 0200000000000000 00000000 0000000000000000"  # "tt": 2 × F32 at 0
    )
    raw += bytes(-len(raw) % 32) + struct.pack("<ff", 1.5, -2.0)
    header = read_gguf_header(save(raw))
    key, tensor = header.metadata["k"], header.tensors[0]
    assert (key.value, key.value_type, key.start, key.end) == (42, UINT32, 24, 41)
    assert (tensor.name, tensor.shape, tensor.ggml_type, tensor.offset, tensor.size) == ("tt", (2,), 0, 0, 8)
    assert (tensor.start, tensor.end, header.infos_end, header.data_start) == (41, 75, 75, 96)


def test_spans_cover_the_header_without_gaps(save: Save) -> None:
    raw = small()
    header = read_gguf_header(save(raw))
    spans = [(item.start, item.end) for item in header.metadata.values()]
    spans += [(tensor.start, tensor.end) for tensor in header.tensors]
    assert spans[0][0] == header.kv_start == 24
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans))
    assert spans[-1][1] == header.infos_end
    assert raw[slice(*spans[0])] == entry("general.architecture", STRING, text("llama"))


def test_every_value_type_as_the_reference_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "all.gguf"
    writer = GGUFWriter(path, "llama")
    scalars: dict[GGUFValueType, Any] = {
        GGUFValueType.UINT8: 200, GGUFValueType.INT8: -3, GGUFValueType.UINT16: 60000,
        GGUFValueType.INT16: -300, GGUFValueType.UINT32: 4_000_000_000,
        GGUFValueType.INT32: -70000, GGUFValueType.FLOAT32: 0.1,
        GGUFValueType.BOOL: True, GGUFValueType.STRING: "grüß", GGUFValueType.UINT64: 2**63 + 1,
        GGUFValueType.INT64: -(2**40), GGUFValueType.FLOAT64: 1e-300,
    }  # fmt: skip
    for kind, value in scalars.items():
        writer.add_key_value(f"x.{kind.name}", value, kind)
    writer.add_array("x.strings", ["a", "", "long" * 50])
    writer.add_array("x.floats", [0.5, -1.25])
    writer.add_array("x.bools", [True, False])
    writer.add_tensor("t", np.ones((4, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header, reference = read_gguf_header(path), GGUFReader(path)
    for kind in scalars:
        assert header.get(f"x.{kind.name}") == reference.fields[f"x.{kind.name}"].contents()
    assert header.get("x.BOOL") is True
    assert header.read_array("x.strings") == ["a", "", "long" * 50]
    assert header.read_array("x.floats").tolist() == [0.5, -1.25]
    assert header.read_array("x.bools").tolist() == [True, False]
    assert header.get("x.floats", "absent") == "absent", "arrays are decoded on demand only"
    tensor = header.tensor("t")
    assert tensor is not None
    assert (tensor.shape, tensor.size) == ((8, 4), 128)
    assert header.data_start == reference.data_offset
    assert header.tensor("absent") is None


def test_arrays_of_strings_that_are_not_utf8_come_back_bit_for_bit(save: Save) -> None:
    header = read_gguf_header(save(gguf([array("t", STRING, 2, text(b"\xff\x00") + text(b"ok"))], [])))
    assert [item.encode(errors="surrogateescape") for item in header.read_array("t")] == [b"\xff\x00", b"ok"]


def test_version_2_and_other_alignments_are_read(save: Save) -> None:
    alignment = entry("general.alignment", UINT32, u32(128))
    raw = gguf([alignment], [info("a", (1,), 0, 0), info("b", (1,), 0, 128)], 132, version=2, alignment=128)
    header = read_gguf_header(save(raw))
    assert (header.version, header.alignment, header.data_start % 128) == (2, 128, 0)


def test_truncation_at_every_byte_says_so(save: Save) -> None:
    raw = small()
    read_gguf_header(save(raw))
    for length in range(len(raw)):
        with pytest.raises(InputFileError, match=r"truncated|empty") as caught:
            read_gguf_header(save(raw[:length]))
        if length:
            assert f"the file has {length:,}" in str(caught.value)


def test_a_truncated_file_names_the_bytes_needed(save: Save) -> None:
    raw = small()
    with pytest.raises(InputFileError, match=rf"'b' ends at byte {len(raw):,}, the file has {len(raw) - 1:,}"):
        read_gguf_header(save(raw[:-1]))


def test_an_array_of_2_to_the_63_elements_is_refused_at_once(save: Save) -> None:
    for element_type in (0, 8):
        raw = gguf([array("abc", element_type, 1 << 63, b"")], [])
        with pytest.raises(InputFileError, match=r"needs at least 9,223,372|needs at least 73,786,976"):
            read_gguf_header(save(raw))


HUGE = 1 << 62
BAD: dict[str, tuple[bytes, str]] = {
    "magic": (b"GGML" + bytes(40), "begins with b'GGML'"),
    "big-endian": (b"GGUF" + bytes.fromhex("00000003") + bytes(16), "big-endian"),
    "version 1": (gguf([], [], version=1), "version is 1"),
    "version 4": (gguf([], [], version=4), "version is 4"),
    "version 0": (gguf([], [], version=0), "version is 0"),
    "key count": (gguf([], [], counts=(0, HUGE)), "truncated"),
    "tensor count": (gguf([], [], counts=(HUGE, 0)), "truncated"),
    "key length": (gguf([struct.pack("<Q", HUGE) + bytes(64)], []), "truncated"),
    "long key": (gguf([entry("k" * 65537, 0, b"\0")], []), "65,537 bytes"),
    "key bytes": (gguf([entry(b"\xff", 0, b"\0")], []), "not UTF-8"),
    "string length": (gguf([entry("k", STRING, struct.pack("<Q", HUGE))], []), "truncated"),
    "long string": (gguf([entry("k", STRING, text("x" * ((1 << 26) + 1)))], []), "67,108,865 bytes"),
    "long text": (gguf([entry("k", STRING, text("x" * (1 << 21)))], []), "too many bytes for a file of this size"),
    "value type": (gguf([entry("k", 13, bytes(8))], []), "unknown value type 13"),
    "element type": (gguf([array("k", 13, 1, bytes(8))], []), "unknown element type 13"),
    "nested array": (gguf([array("k", ARRAY, 1, bytes(12))], []), "nested"),
    "string in array": (gguf([array("k", STRING, 1, struct.pack("<Q", HUGE))], []), "truncated"),
    "duplicate key": (gguf([entry("k", 0, b"\0"), entry("k", 0, b"\0")], []), "'k' appears twice"),
    "alignment 0": (gguf([entry("general.alignment", UINT32, u32(0))], []), "power of two"),
    "alignment 48": (gguf([entry("general.alignment", UINT32, u32(48))], []), "power of two"),
    "alignment type": (gguf([entry("general.alignment", 10, struct.pack("<Q", 32))], []), "power of two"),
    "5 dimensions": (gguf([], [info("t", (1, 1, 1, 1, 1), 0, 0)], 4), "5 dimensions"),
    "dimensions": (gguf([], [text("t") + u32(0xFFFFFFFF) + bytes(64)], 4), "4,294,967,295 dimensions"),
    "shape overflow": (gguf([], [info("t", (1 << 32, 1 << 32), 0, 0)], 4), "impossible shape"),
    "negative size": (gguf([], [info("t", (0, 1 << 63), 0, 0)], 4), "impossible shape"),
    "tensor size": (gguf([], [info("t", (1 << 40,), 0, 0)], 4), "truncated"),
    "ggml type": (gguf([], [info("t", (32,), 99, 0)], 128), "unknown ggml type 99"),
    "block": (gguf([], [info("t", (33,), 8, 0)], 128), "multiple of its block of 32"),
    "long name": (gguf([], [info("t" * 64, (1,), 0, 0)], 4), "64 bytes"),
    "duplicate tensor": (gguf([], [info("t", (1,), 0, 0), info("t", (1,), 0, 32)], 36), "'t' appears twice"),
    "first offset": (gguf([], [info("t", (1,), 0, 32)], 64), "offset 32, expected 0"),
    "gap": (gguf([], [info("a", (1,), 0, 0), info("b", (1,), 0, 64)], 128), "offset 64, expected 32"),
    "overlap": (gguf([], [info("a", (9,), 0, 0), info("b", (1,), 0, 32)], 128), "offset 32, expected 64"),
    "unaligned": (gguf([], [info("a", (1,), 0, 0), info("b", (1,), 0, 4)], 128), "offset 4, expected 32"),
}


@pytest.mark.parametrize("name", BAD)
def test_each_rule_refuses_its_file(name: str, save: Save) -> None:
    raw, message = BAD[name]
    with pytest.raises(InputFileError, match=message):
        read_gguf_header(save(raw))


@pytest.mark.parametrize("limit", ["MAX_ENTRIES", "MAX_TENSORS", "MAX_STRINGS"])
def test_counts_are_limited_even_where_the_file_would_hold_them(
    limit: str, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"longrope_export.formats.gguf_header.{limit}", 2)
    entries = [array("k", STRING, 3, text("") * 3), entry("a", 0, b"\0"), entry("b", 0, b"\0")]
    raw = gguf(entries[: 3 if limit == "MAX_ENTRIES" else 1], [info(f"t{i}", (8,), 0, 32 * i) for i in range(3)], 96)
    if limit == "MAX_TENSORS":
        raw = gguf([], [info(f"t{i}", (8,), 0, 32 * i) for i in range(3)], 96)
    with pytest.raises(InputFileError, match="at most 2 are allowed"):
        read_gguf_header(save(raw))


def test_a_sparse_file_full_of_empty_strings_costs_no_time(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(gguf([array("k", STRING, 1 << 30, b"")], []))
        file.truncate(1 << 34)
    start = time.process_time()
    with pytest.raises(InputFileError, match="strings, at most"):
        read_gguf_header(path)
    assert time.process_time() - start < 1.0


@given(flips=st.lists(st.tuples(st.integers(0, len(small()) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_raises_only_our_error(flips: list[tuple[int, int]], save: Save) -> None:
    raw = bytearray(small())
    for position, value in flips:
        raw[position] = value
    try:
        header = read_gguf_header(save(bytes(raw)))
    except InputFileError:
        return
    for key, item in header.metadata.items():
        if item.is_array:
            header.read_array(key)
    assert all(header.data_start + tensor.offset + tensor.size <= header.file_size for tensor in header.tensors)


def test_missing_files_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="No such file"):
        read_gguf_header(tmp_path / "absent.gguf")
    with pytest.raises(InputFileError, match="not a regular file"):
        read_gguf_header(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputFileError, match="not a regular file"):
            read_gguf_header(tmp_path / "pipe")


def test_reading_an_array_fails_clearly(save: Save) -> None:
    path = save(small())
    header = read_gguf_header(path)
    with pytest.raises(InputFileError, match="no array 'absent'"):
        header.read_array("absent")
    with pytest.raises(InputFileError, match=r"no array 'general\.architecture'"):
        header.read_array("general.architecture")
    path.write_bytes(small()[:100])
    with pytest.raises(InputFileError, match="truncated"):
        header.read_array("ids")


def test_a_large_vocabulary_is_skipped_not_decoded(tmp_path: Path) -> None:
    tokens = b"".join(text(f"token{i}") for i in range(150_000))
    merges = b"".join(text(f"tok en{i}") for i in range(150_000))
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf([array("t", STRING, 150_000, tokens), array("m", STRING, 150_000, merges)], []))
    start = time.process_time()
    header = read_gguf_header(path)
    assert time.process_time() - start < 1.0, "processor time; about 0.1 s on an idle machine"
    assert header.metadata["m"].array_length == 150_000
    assert header.read_array("m")[-1] == "tok en149999"
