"""`write_safetensors_metadata`: entries in the header, tensors as they were."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from longrope_export.converters.safetensors import write_safetensors_metadata
from longrope_export.errors import InputFileError, OutputError
from longrope_export.formats.safetensors_header import read_safetensors_header


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    tensors = {
        "b": generator.standard_normal((3, 5)).astype(np.float32),
        "a": np.arange(7, dtype=np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "flag": np.array([True]),
    }
    save_file(tensors, tmp_path / "shard.safetensors", metadata={"format": "pt", "note": "kept"})
    return tmp_path / "shard.safetensors"


def test_entries_are_added_and_tensors_are_the_same_bytes(shard: Path, tmp_path: Path) -> None:
    target = tmp_path / "new.safetensors"
    write_safetensors_metadata(shard, target, {"zeta": "1", "ä": "\u2028"})
    before, after = read_safetensors_header(shard), read_safetensors_header(target)
    assert dict(after.metadata) == {"format": "pt", "note": "kept", "zeta": "1", "ä": "\u2028"}
    assert dict(after.tensors) == dict(before.tensors)
    assert target.read_bytes()[after.data_start :] == shard.read_bytes()[before.data_start :]
    with safe_open(target, "np") as opened:
        assert opened.metadata()["zeta"] == "1"
        assert opened.get_tensor("b").shape == (3, 5)


def test_equal_input_gives_equal_bytes_whatever_the_order(shard: Path, tmp_path: Path) -> None:
    write_safetensors_metadata(shard, tmp_path / "1", {"x": "1", "y": "2"})
    write_safetensors_metadata(shard, tmp_path / "2", {"y": "2", "x": "1"})
    write_safetensors_metadata(tmp_path / "1", tmp_path / "3", {"x": "1", "y": "2"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes() == (tmp_path / "3").read_bytes()


def test_golden_bytes(tmp_path: Path) -> None:
    header = b'{"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "old").write_bytes(len(header).to_bytes(8, "little") + header + b"\x07\x08")
    write_safetensors_metadata(tmp_path / "old", tmp_path / "new", {"k": "v"})
    written = b'{"__metadata__":{"format":"pt","k":"v"},"t":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    padded = written.ljust(96)
    assert (tmp_path / "new").read_bytes() == (96).to_bytes(8, "little") + padded + b"\x07\x08"


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.text(), st.text(), max_size=4))
def test_any_text_survives(entries: dict[str, str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        save_file({"t": np.zeros(3)}, Path(name) / "old")
        write_safetensors_metadata(Path(name) / "old", Path(name) / "new", entries)
        with safe_open(Path(name) / "new", "np") as opened:
            assert opened.metadata() == {"format": "pt", **entries}


def test_existing_target_truncated_source_and_the_source_itself_are_refused(shard: Path, tmp_path: Path) -> None:
    raw = shard.read_bytes()
    (tmp_path / "there").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_safetensors_metadata(shard, tmp_path / "there", {"k": "v"})
    write_safetensors_metadata(shard, tmp_path / "there", {"k": "v"}, overwrite=True)
    with pytest.raises(OutputError, match="is the source itself"):
        write_safetensors_metadata(shard, shard, {"k": "v"}, overwrite=True)
    assert shard.read_bytes() == raw
    for size in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:size])
        with pytest.raises(InputFileError):
            write_safetensors_metadata(tmp_path / "cut", tmp_path / "never", {"k": "v"})
    assert not (tmp_path / "never").exists()


def test_a_header_beyond_the_formats_limit_is_refused(shard: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="safetensors allows 100,000,000"):
        write_safetensors_metadata(shard, tmp_path / "new", {"k": "v" * 100_000_000})
    assert json.loads(shard.read_bytes()[8:].split(b"}}")[0] + b"}}")["__metadata__"]
    assert not (tmp_path / "new").exists()
