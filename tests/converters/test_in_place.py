"""`longrope patch --in-place` and `longrope unpatch`: the same model, no byte moved that need not be, every byte back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longrope_export import RopeScaling
from longrope_export.converters.gguf.in_place import patch_in_place, unpatch_in_place
from longrope_export.converters.gguf.in_place_copy import write_original
from longrope_export.converters.gguf.in_place_undo import UNDO_KEY, read_original
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.errors import InputFileError, LossyTargetError, OutputError, ScalingError
from longrope_export.formats.gguf_header import GgufHeader, read_gguf_header
from longrope_export.formats.gguf_tensors import read_raw, read_tensor
from longrope_export.formats.records import read_scaling

Record = Callable[..., RopeScaling]
Build = Callable[..., Path]

LONG, SHORT, STATIC = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
BLOCK = 4096


def values(header: GgufHeader) -> dict[str, Any]:
    """Every key with its value, the undo array apart."""
    found = {}
    for key, entry in header.metadata.items():
        if key != UNDO_KEY:
            found[key] = list(header.read_array(key)) if entry.is_array else entry.value
    return found


def tensors(header: GgufHeader) -> dict[str, bytes]:
    return {info.name: read_raw(header, info.name) for info in header.tensors}


@pytest.mark.parametrize("alignment", [None, 64, BLOCK])
@pytest.mark.parametrize("extra", [{}, {STATIC: np.ones(8)}, {LONG: np.ones(8), SHORT: np.ones(8)}])
def test_the_same_model_as_the_copy_and_every_byte_back(
    gguf_file: Build, record: Record, tmp_path: Path, alignment: int | None, extra: dict[str, Any]
) -> None:
    source = gguf_file(tensors=extra, alignment=alignment, keys={"llama.rope.scaling.yarn_beta_fast": 32.0})
    before, inode = source.read_bytes(), source.stat().st_ino
    patch_gguf(source, tmp_path / "copy.gguf", record())
    result = patch_in_place(source, record())
    assert source.stat().st_ino == inode
    ours, copy = read_gguf_header(source), read_gguf_header(tmp_path / "copy.gguf")
    assert values(ours) == values(copy)
    assert tensors(ours) == tensors(copy)
    assert read_scaling(source) == record()
    assert ours.infos_end == ours.data_start, "the undo array takes up the room to the byte"
    assert (result.shift, result.size) == (len(source.read_bytes()) - len(before) - result.growth, ours.file_size)
    assert result.shift % BLOCK == 0
    assert unpatch_in_place(source).size == len(before)
    assert source.read_bytes() == before


def test_weights_are_not_moved_within_the_data(gguf_file: Build, record: Record) -> None:
    source = gguf_file()
    before = read_gguf_header(source)
    patch_in_place(source, record())
    after = read_gguf_header(source)
    for info in before.tensors:
        assert after.tensor(info.name).offset == info.offset  # type: ignore[union-attr]
    assert [info.name for info in after.tensors][-2:] == [LONG, SHORT]


def test_patching_again_replaces_and_never_stacks(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source, first, second = gguf_file(tensors={STATIC: np.ones(8)}), record(), record(max_position_embeddings=4096)
    before = source.read_bytes()
    patch_in_place(source, second)
    direct = source.read_bytes()
    unpatch_in_place(source)
    patch_in_place(source, first)
    once = source.read_bytes()
    assert patch_in_place(source, first).shift == 0
    assert source.read_bytes() == once
    assert patch_in_place(source, second).shift == 0
    assert source.read_bytes() == direct
    unpatch_in_place(source)
    assert source.read_bytes() == before


def test_a_longer_record_gets_more_room_and_a_shorter_one_keeps_it(gguf_file: Build, record: Record) -> None:
    source = gguf_file()
    before = source.read_bytes()
    patch_in_place(source, record())
    long = record(provenance={"note": "x" * 3 * BLOCK})
    assert patch_in_place(source, long).shift == 3 * BLOCK
    assert read_scaling(source) == long
    assert patch_in_place(source, record()).shift == 0
    assert read_scaling(source) == record()
    unpatch_in_place(source)
    assert source.read_bytes() == before


def test_a_last_tensor_without_padding_and_bytes_behind_it(gguf_file: Build, record: Record) -> None:
    source = gguf_file()
    header = read_gguf_header(source)
    last = header.tensors[-1]
    end = header.data_start + last.offset + last.size
    for raw in (source.read_bytes()[:end], source.read_bytes() + b"more" * 100):
        source.write_bytes(raw)
        patch_in_place(source, record())
        assert read_tensor(read_gguf_header(source), SHORT).tolist() == list(record().short_factor)
        unpatch_in_place(source)
        assert source.read_bytes() == raw
    source.write_bytes(source.read_bytes() + bytes(1 << 17))
    with pytest.raises(OutputError, match="too many bytes follow its last tensor; write a copy instead"):
        patch_in_place(source, record())


@pytest.mark.parametrize(
    "extra",
    [
        {STATIC: np.ones(8), LONG: np.ones(8), SHORT: np.ones(8)},
        {LONG: np.ones(5)},
        {STATIC: np.ones((1, 8))},
    ],
)
def test_tensors_that_would_leave_a_gap_are_refused(gguf_file: Build, record: Record, extra: dict[str, Any]) -> None:
    source = gguf_file(tensors=extra)
    before = source.read_bytes()
    with pytest.raises(OutputError, match=r"tensor rope_\w+.weight stands between others .* write a copy instead"):
        patch_in_place(source, record(), allow_lossy=True)
    assert source.read_bytes() == before


def test_the_records_own_checks_come_first(gguf_file: Build, record: Record) -> None:
    source = gguf_file()
    before = source.read_bytes()
    with pytest.raises(ScalingError, match="rope_theta"):
        patch_in_place(source, record(rope_theta=2.0))
    with pytest.raises(LossyTargetError, match="n̂ = 4"):
        patch_in_place(source, record(long_start_tokens=4))
    assert source.read_bytes() == before
    assert len(patch_in_place(source, record(long_start_tokens=4), allow_lossy=True).lossy) == 1


def test_copies_of_a_patched_file_carry_no_undo_array(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file(tensors={STATIC: np.ones(8)})
    patch_gguf(source, tmp_path / "a.gguf", record(max_position_embeddings=4096))
    patch_in_place(source, record())
    patch_gguf(source, tmp_path / "b.gguf", record(max_position_embeddings=4096))
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_moved_file_carries_what_unpatching_needs(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file(tensors={STATIC: np.ones(8)})
    before = source.read_bytes()
    patch_in_place(source, record())
    (tmp_path / "far").mkdir()
    copy = Path(shutil.copy(source, tmp_path / "far" / "other.gguf"))
    assert write_original(copy, tmp_path / "original.gguf") == len(before)
    assert (tmp_path / "original.gguf").read_bytes() == before
    unpatch_in_place(copy)
    assert copy.read_bytes() == before
    with pytest.raises(InputFileError, match="was not patched in place"):
        unpatch_in_place(copy)
    with pytest.raises(InputFileError, match="was not patched in place"):
        write_original(copy, tmp_path / "again.gguf")


def test_a_file_that_another_tool_changed_is_left_alone(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file(keys={"general.name": "one"})
    patch_in_place(source, record())
    entry = read_gguf_header(source).metadata["general.name"]
    raw = bytearray(source.read_bytes())
    raw[entry.end - 3 : entry.end] = b"two"
    longer = source.read_bytes() + bytes(32)
    for changed in (bytes(raw), source.read_bytes()[: -2 * 32]):
        source.write_bytes(changed)
        for action in (lambda: unpatch_in_place(source), lambda: write_original(source, tmp_path / "x.gguf")):
            with pytest.raises(InputFileError, match=r"another tool has changed|is truncated"):
                action()
        assert source.read_bytes() == changed
    source.write_bytes(longer)
    unpatch_in_place(source)
    assert not read_gguf_header(source).tensor(LONG), "what was added behind the factors goes with them"


def undo_payload(path: Path) -> dict[str, Any]:
    payload: dict[str, Any] = json.loads(bytes(read_gguf_header(path).read_array(UNDO_KEY)).rstrip(b"\0"))
    return payload


def with_payload(path: Path, payload: object) -> None:
    entry = read_gguf_header(path).metadata[UNDO_KEY]
    text = payload if isinstance(payload, bytes) else json.dumps(payload, separators=(",", ":")).encode()
    raw = bytearray(path.read_bytes())
    assert len(text) <= entry.end - entry.elements
    raw[entry.elements : entry.end] = text.ljust(entry.end - entry.elements, b"\0")
    path.write_bytes(raw)


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "empty": lambda _: b"",
    "no object": lambda _: [],
    "deep": lambda _: b"[" * 2000,
    "format": lambda good: {**good, "format": 2},
    "header too long": lambda good: {**good, "header": 1 << 40},
    "header not a number": lambda good: {**good, "header": 1e3},
    "no header": lambda good: {**good, "header": 0, "pieces": []},
    "other hash": lambda good: {**good, "sha256": "0" * 64},
    "huge piece": lambda good: {**good, "pieces": [[0, 1 << 60]]},
    "negative piece": lambda good: {**good, "pieces": [[-(1 << 60), 24]]},
    "backward piece": lambda good: {**good, "pieces": [[100, -24]]},
    "many pieces": lambda good: {**good, "pieces": [[24, 400]] * 300},
    "empty pieces": lambda good: {**good, "pieces": [*good["pieces"], ""]},
    "piece of text": lambda good: {**good, "pieces": ["no hex"]},
    "piece of three": lambda good: {**good, "pieces": [[1, 2, 3]]},
    "size too small": lambda good: {**good, "size": 100},
    "size too large": lambda good: {**good, "size": 1 << 62},
    "size negative": lambda good: {**good, "size": -1},
    "no spots": lambda good: {**good, "spots": []},
    "spot outside": lambda good: {**good, "spots": [[1 << 40, "00"], *good["spots"]]},
    "spot negative": lambda good: {**good, "spots": [[-8, "00"], *good["spots"]]},
    "spots overlap": lambda good: {**good, "spots": [good["spots"][-1], *good["spots"]]},
    "spot not last": lambda good: {**good, "spots": [[0, "00"]]},
    "spot of text": lambda good: {**good, "spots": [[good["spots"][-1][0], "zz"]]},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_undo_arrays_are_refused(gguf_file: Build, record: Record, name: str) -> None:
    source = gguf_file()
    patch_in_place(source, record())
    good = undo_payload(source)
    with_payload(source, good)
    assert read_original(read_gguf_header(source)) is not None
    with_payload(source, HOSTILE[name](good))
    changed = source.read_bytes()
    for action in (lambda: unpatch_in_place(source), lambda: patch_in_place(source, record())):
        with pytest.raises(InputFileError, match=r"longrope_export.undo is damaged|is truncated"):
            action()
    assert source.read_bytes() == changed


def test_an_undo_key_of_another_type_is_refused(gguf_file: Build, record: Record) -> None:
    source = gguf_file(keys={UNDO_KEY: "text"})
    with pytest.raises(InputFileError, match=r"longrope_export\.undo is damaged"):
        patch_in_place(source, record())


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_to_the_undo_array_raises_only_our_error(
    gguf_file: Build, record: Record, data: st.DataObject
) -> None:
    source = gguf_file(name=f"{data.draw(st.integers(0, 1))}.gguf")
    before = source.read_bytes()
    patch_in_place(source, record())
    entry = read_gguf_header(source).metadata[UNDO_KEY]
    raw = bytearray(source.read_bytes())
    length = len(bytes(raw[entry.elements : entry.end]).rstrip(b"\0"))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[entry.elements + data.draw(st.integers(0, length - 1))] = data.draw(st.integers(0, 255))
    source.write_bytes(raw)
    try:
        unpatch_in_place(source)
    except InputFileError:
        assert source.read_bytes() == raw
    else:
        assert source.read_bytes() == before, "only damage that means the same may pass"
