"""What an undo record beside a file is worth: power cuts, other files, damage; and a real llama.cpp on the result."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling
from longrope_export.converters.gguf import in_place_change
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.in_place import patch_in_place, unpatch_in_place
from longrope_export.converters.gguf.in_place_recovery import recover
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.converters.verify import verify
from longrope_export.demo import demo_model_path
from longrope_export.errors import InputFileError, OutputError, RuntimeFailure
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.records import read_scaling
from longrope_export.formats.unfinished import SPOILED_MAGIC, record_path
from longrope_export.runtimes.llamacpp import next_token_probabilities

Record = Callable[..., RopeScaling]
Build = Callable[..., Path]
BLOCK = 4096


class PowerCutError(BaseException):
    """Ends a change without a chance to bring anything back."""


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """`with cut_at(name):` ends a change as soon as it calls `in_place_change.name` for the first time."""

    @contextlib.contextmanager
    def block(name: str) -> Iterator[None]:
        def cut(*_: object) -> None:
            raise PowerCutError

        with monkeypatch.context() as patched, pytest.raises(PowerCutError):
            patched.setattr(in_place_change, name, cut)
            patched.setattr(in_place_change, "_bring_back", lambda *_: None)
            yield

    return block


@pytest.fixture
def model(gguf_file: Build) -> Path:
    """A GGUF with 400 kB of random tensor data."""
    return gguf_file(tensors={"blk.0.ffn_up.weight": np.random.default_rng(1).standard_normal((100, 1000))})


def test_data_torn_by_a_power_cut_are_refused_by_name(model: Path, record: Record, cut_at: Any) -> None:
    """The shift was half done: the first half of the data still stands where it was."""
    before = model.read_bytes()
    with cut_at("shift_data"):
        patch_in_place(model, record())
    grown = model.read_bytes()
    start = read_gguf_header_of(before, model)
    middle = start + len(grown) // 2
    torn = grown[:middle] + bytes(BLOCK) + grown[middle:]
    model.write_bytes(torn)
    with pytest.raises(InputFileError, match=r"cut short, but its data at byte [\d,]+ are not what they were"):
        recover(model)
    assert model.read_bytes() == torn
    assert record_path(model).exists()
    model.write_bytes(grown[:start] + bytes(8) + grown[start + 8 :])
    with pytest.raises(InputFileError, match="are not what they were"):
        recover(model)
    model.write_bytes(grown)
    assert recover(model) == "undone"
    assert model.read_bytes() == before


def read_gguf_header_of(raw: bytes, beside: Path) -> int:
    """Where the tensor data of the file with the bytes `raw` begin."""
    copy = beside.with_name("copy.gguf")
    copy.write_bytes(raw)
    return read_gguf_header(copy).data_start


@pytest.mark.parametrize("step", ["_spoil_magic", "write_at", "_cut", "shift_data", "_write_header"])
def test_unfinished_files_are_closed_to_readers_and_mended(model: Path, record: Record, cut_at: Any, step: str) -> None:
    before = model.read_bytes()
    with cut_at(step):
        patch_in_place(model, record())
    with pytest.raises(InputFileError, match="was being changed in place"):
        read_gguf_header(model)
    with pytest.raises(InputFileError, match="was being changed in place"):
        patch_in_place(model, record())
    link = model.with_name("link.gguf")
    link.symlink_to(model)
    with pytest.raises(InputFileError, match="was being changed in place"):
        read_gguf_header(link)
    assert recover(model) == "undone"
    assert model.read_bytes() == before
    assert recover(model) is None


def test_a_finished_change_keeps_its_result(model: Path, record: Record, cut_at: Any) -> None:
    with cut_at("remove_record"):
        patch_in_place(model, record())
    after = model.read_bytes()
    assert recover(model) == "finished"
    assert model.read_bytes() == after
    assert read_scaling(model) == record()


def test_a_file_in_use_is_not_mended(model: Path, record: Record, cut_at: Any) -> None:
    with cut_at("shift_data"):
        patch_in_place(model, record())
    torn = model.read_bytes()
    with model.open("rb"), pytest.raises(OutputError, match="cannot be undone now: another program has it open"):
        recover(model)
    assert model.read_bytes() == torn
    assert recover(model) == "undone"


def test_without_its_record_a_spoiled_file_says_what_is_missing(model: Path, record: Record, cut_at: Any) -> None:
    with cut_at("shift_data"):
        patch_in_place(model, record())
    record_path(model).rename(model.with_name("kept"))
    with pytest.raises(InputFileError, match="its undo record is not beside it; put that back"):
        read_gguf_header(model)
    assert model.read_bytes()[:4] == SPOILED_MAGIC
    model.with_name("kept").rename(record_path(model))
    assert recover(model) == "undone"


def test_a_record_cut_short_means_an_untouched_file(model: Path, record: Record, cut_at: Any) -> None:
    before = model.read_bytes()
    with cut_at("_spoil_magic"):
        patch_in_place(model, record())
    whole = record_path(model).read_bytes()
    for raw in (b"", whole[:100], whole[:-1], whole[:-40] + b"x" + whole[-39:], b"x" * (40 << 20)):
        record_path(model).write_bytes(raw)
        assert recover(model) == "undone"
        assert model.read_bytes() == before
        record_path(model).write_bytes(raw)
        spoiled = SPOILED_MAGIC + before[4:]
        model.write_bytes(spoiled)
        with pytest.raises(InputFileError, match="but the record is damaged"):
            recover(model)
        assert model.read_bytes() == spoiled
        model.write_bytes(before)


def test_a_record_about_another_file_is_refused(model: Path, record: Record, cut_at: Any) -> None:
    before = model.read_bytes()
    with cut_at("shift_data"):
        patch_in_place(model, record())
    raw = record_path(model).read_bytes()
    torn = model.read_bytes()
    model.rename(model.with_name("old.gguf"))
    model.write_bytes(before)
    with pytest.raises(InputFileError, match="another file that had this name; if this is a fresh copy"):
        recover(model)
    model.with_name("old.gguf").rename(model)
    for changed, reason in (
        (torn[:-600], "which is no state of that change"),
        (b"ELF!" + torn[4:], "the file was changed since"),
        (before + b"more", "the file was changed since"),
        (before[:40] + b"x" + before[41:], "the file was changed since"),
    ):
        model.write_bytes(changed)
        with pytest.raises(InputFileError, match=reason):
            recover(model)
        assert model.read_bytes() == changed
        assert record_path(model).read_bytes() == raw


def test_a_system_that_refuses_to_bring_back_keeps_the_record(
    model: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = model.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr(in_place_change, "_write_header", refuse)
        with pytest.raises(OutputError, match=r"not yet be brought back \(No space left.*run `longrope describe`"):
            patch_in_place(model, record())
        with pytest.raises(OutputError, match="cannot be undone now: No space left"):
            recover(model)
    assert recover(model) == "undone"
    assert model.read_bytes() == before


def demo_record() -> RopeScaling:
    return RopeScaling(
        rope_theta=10000.0,
        rotary_dim=64,
        original_max_position_embeddings=256,
        max_position_embeddings=1024,
        long_factor=tuple(np.linspace(1, 4, 32)),
        short_factor=tuple(np.linspace(1, 1.2, 32)),
        long_attention_factor=1.1,
        short_attention_factor=1.1,
    )


def first_probabilities(path: Path, context: int) -> Any:
    """Log-probabilities after ten tokens in a real llama.cpp."""
    return next_token_probabilities(path, [list(range(100, 110))], context=context, threads=1)


def test_llama_cpp_reads_the_same_numbers_as_from_the_copy(tmp_path: Path, cut_at: Any) -> None:
    path = tmp_path / "demo.gguf"
    convert_to_gguf(demo_model_path(), path, dtype="f32")
    patch_gguf(path, tmp_path / "copy.gguf", demo_record())
    with cut_at("_write_header"):
        patch_in_place(path, demo_record())
    assert recover(path) == "undone"
    patch_in_place(path, demo_record())
    for context in (256, 1024):
        expected = first_probabilities(tmp_path / "copy.gguf", context)
        assert np.array_equal(first_probabilities(path, context), expected)
    spoil_filler(path)
    with contextlib.suppress(RuntimeFailure):
        assert not np.array_equal(first_probabilities(path, 1024), expected), "zeros outside the array are no filler"


@pytest.mark.slow
def test_the_verifier_finds_the_records_factors_in_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "demo.gguf"
    convert_to_gguf(demo_model_path(), path, dtype="f32")
    before = path.read_bytes()
    patch_in_place(path, demo_record())
    report = verify(path, prefixes=4)
    assert report.verdict == "pass", report
    assert {entry.runtime for entry in report.regimes} == {"llama.cpp"}
    unpatch_in_place(path)
    assert path.read_bytes() == before


def spoil_filler(path: Path) -> None:
    """Leave the zeros that fill the undo array behind the tensor table instead: the data seem to begin earlier."""
    header = read_gguf_header(path)
    entry = header.metadata["longrope_export.undo"]
    raw = path.read_bytes()
    kept = len(raw[entry.elements : entry.end].rstrip(b"\0"))
    filler = entry.end - entry.elements - kept
    shorter = raw[: entry.elements - 8] + struct.pack("<Q", kept) + raw[entry.elements : entry.elements + kept]
    path.write_bytes(shorter + raw[entry.end : header.data_start] + bytes(filler) + raw[header.data_start :])
