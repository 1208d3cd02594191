"""Split GGUF models: described, read, patched and examined as one, and run by a real llama.cpp."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.checkpoint import open_checkpoint
from longrope_export.cli.main import cli
from longrope_export.converters.doctor.examine import examine
from longrope_export.converters.doctor.repair import repair
from longrope_export.converters.gguf.encode import Int32, UInt16
from longrope_export.converters.gguf.in_place import patch_in_place, unpatch_in_place
from longrope_export.converters.gguf.in_place_copy import write_original
from longrope_export.converters.gguf.patch import patch_gguf, plan_patch
from longrope_export.converters.gguf.rewrite import GgufChanges, rewrite_gguf
from longrope_export.description import describe
from longrope_export.errors import InputFileError, OutputError, RuntimeFailure, UnsupportedModelError
from longrope_export.formats.gguf_header import GgufHeader, read_gguf_header
from longrope_export.formats.gguf_shards import read_gguf, shard_count
from longrope_export.formats.gguf_tensors import read_raw, read_tensor
from longrope_export.formats.records import read_scaling
from longrope_export.runtimes import llamacpp

LONG, STATIC = "rope_factors_long.weight", "rope_freqs.weight"
Write = Callable[..., Path]


def split(source: Path, folder: Path, limit: int = 11, extra: dict[str, Any] | None = None) -> Path:
    """`source` in shards of at most `limit` tensors, by gguf's own writer; returns the first."""
    header = read_gguf_header(source)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=limit)
    for key, entry in header.metadata.items():
        if key not in ("general.architecture", "GGUF.version"):
            value = header.read_array(key) if entry.is_array else entry.value
            kind = gguf.GGUFValueType(entry.value_type)
            inner = None if entry.array_type is None else gguf.GGUFValueType(entry.array_type)
            writer.add_key_value(key, list(value) if entry.is_array else value, kind, inner)
    tensors = {info.name: read_tensor(header, info.name) for info in header.tensors}
    for name, values in {**tensors, **(extra or {})}.items():
        writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file(folder / "m.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(folder.glob("m-00001-of-*.gguf"))


@pytest.fixture
def scaling(record: Any) -> RopeScaling:
    found: RopeScaling = record(32, original_max_position_embeddings=256, max_position_embeddings=1024)
    return found


@pytest.fixture
def whole(write_random_gguf: Write, tmp_path: Path) -> Path:
    return write_random_gguf(tmp_path / "whole.gguf")


@pytest.fixture
def first(whole: Path, tmp_path: Path) -> Path:
    return split(whole, tmp_path)


def run(path: Path) -> Any:
    prompt = [(7 * index * index + 3) % 290 + 2 for index in range(400)]
    return llamacpp.next_token_probabilities(path, [prompt], context=512)[0]


def test_a_split_model_is_described_as_the_whole(whole: Path, first: Path) -> None:
    assert shard_count(read_gguf_header(first)) == 3
    left, right = describe(whole).to_dict(), describe(first).to_dict()
    assert {key for key in left if left[key] != right[key]} == {"path"}
    last = first.with_name("m-00003-of-00003.gguf")
    assert describe(last).to_dict() == right
    header = read_gguf(last)
    for info in read_gguf_header(whole).tensors:
        assert read_raw(header, info.name) == read_raw(read_gguf_header(whole), info.name)


def test_a_patched_split_model_runs_as_the_patched_whole(
    whole: Path, first: Path, scaling: RopeScaling, tmp_path: Path
) -> None:
    target = tmp_path / "new-00001-of-00003.gguf"
    planned, _ = plan_patch(first, target, scaling)
    assert patch_gguf(first, target, scaling) == []
    assert planned == sum(path.stat().st_size for path in tmp_path.glob("new-*.gguf"))
    assert read_scaling(target) == read_scaling(tmp_path / "new-00002-of-00003.gguf") == scaling
    assert describe(target).scaling == scaling
    header = read_gguf(target)
    assert header.get("split.tensors.count") == len(header.all_tensors) == 32
    patch_gguf(whole, tmp_path / "patched.gguf", scaling)
    assert np.abs(run(target) - run(tmp_path / "patched.gguf")).max() < 1e-5
    assert [found.severity for found in examine(target) if found.severity != "information"] == []

    again = tmp_path / "again-00001-of-00003.gguf"
    patch_gguf(target, again, scaling)
    assert again.read_bytes() == target.read_bytes()


def test_static_factors_go_from_whichever_shard_they_are_in(whole: Path, tmp_path: Path, scaling: RopeScaling) -> None:
    first = split(whole, tmp_path, extra={STATIC: np.full(16, 1.1)})
    assert read_gguf_header(first).tensor(STATIC) is None
    assert describe(first).existing_factors == pytest.approx([1.1] * 16)
    target = tmp_path / "new-00001-of-00003.gguf"
    patch_gguf(first, target, scaling)
    assert read_gguf(target).tensor(STATIC) is None
    assert read_scaling(target) == scaling
    assert np.isfinite(run(target)).all()


def test_factors_are_read_from_whichever_shard_they_are_in(whole: Path, tmp_path: Path, scaling: RopeScaling) -> None:
    patch_gguf(whole, tmp_path / "patched.gguf", scaling)
    first = split(tmp_path / "patched.gguf", tmp_path)
    assert read_gguf_header(first).tensor(LONG) is None
    assert read_scaling(first) == scaling
    assert examine(first) != []
    assert {found.severity for found in examine(first)} == {"information"}


def test_outputs_need_the_name_of_a_first_shard(first: Path, scaling: RopeScaling, tmp_path: Path) -> None:
    for name in ("new.gguf", "new-00001-of-00002.gguf"):
        with pytest.raises(OutputError, match=r"name it as it was, like NAME-00001-of-00003.gguf"):
            patch_gguf(first, tmp_path / name, scaling)
    with pytest.raises(OutputError, match=r"name the output new-00001-of-00003.gguf"):
        patch_gguf(first, tmp_path / "new-00002-of-00003.gguf", scaling)
    taken = tmp_path / "new-00003-of-00003.gguf"
    taken.write_text("taken")
    with pytest.raises(OutputError, match="exists already"):
        patch_gguf(first, tmp_path / "new-00001-of-00003.gguf", scaling)
    assert sorted(path.name for path in tmp_path.glob("new*")) == [taken.name]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux inserts room into files")
def test_in_place_the_first_shard_changes_alone(whole: Path, first: Path, scaling: RopeScaling, tmp_path: Path) -> None:
    """Whichever shard is named; llama.cpp runs the result, and `unpatch` brings every byte back."""
    shards = sorted(tmp_path.glob("m-*.gguf"))
    before = {path: path.read_bytes() for path in shards}
    patch_in_place(shards[-1], scaling)
    assert [path for path in shards if path.read_bytes() != before[path]] == [first]
    assert read_scaling(first) == read_scaling(shards[-1]) == scaling
    assert read_gguf(first).get("split.tensors.count") == 32
    assert [found.rule.name for found in examine(first) if found.severity != "information"] == []
    patch_gguf(whole, tmp_path / "patched.gguf", scaling)
    assert np.abs(run(first) - run(tmp_path / "patched.gguf")).max() < 1e-5
    patched = first.read_bytes()
    patch_in_place(first, replace(scaling, max_position_embeddings=2048))
    patch_in_place(first, scaling)
    assert first.read_bytes() == patched
    write_original(first, tmp_path / "copy.gguf")
    assert (tmp_path / "copy.gguf").read_bytes() == before[first]
    unpatch_in_place(shards[1])
    assert {path: path.read_bytes() for path in shards} == before


def test_in_place_is_refused_where_another_shard_would_have_to_change(
    whole: Path, tmp_path: Path, scaling: RopeScaling
) -> None:
    first = split(whole, tmp_path, extra={STATIC: np.full(16, 1.1)})
    before = first.read_bytes()
    with pytest.raises(OutputError, match=r"m-00003-of-00003.gguf holds the tensor rope_freqs.weight.*with --out"):
        patch_in_place(first, replace(scaling, short_factor=(1.1,) * 16))
    assert first.read_bytes() == before


def test_extend_names_and_patches_all_shards(first: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    result = CliRunner().invoke(cli, ["extend", str(first), "--to", "4x", "--method", "yarn"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        f"m-1k-0000{number}-of-00003.gguf" for number in (1, 2, 3)
    ]
    assert describe(tmp_path / "out" / "m-1k-00001-of-00003.gguf").window == 1024


def test_transformers_gets_no_shards(first: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="llama-gguf-split --merge"):
        open_checkpoint(first)


def change(header: GgufHeader, **entries: Any) -> None:
    keys = {f"split.{name.replace('_', '.')}": value for name, value in entries.items()}
    rewrite_gguf(header, header.path, GgufChanges(entries=keys), overwrite=True)


def wrong_total(first: Path) -> None:
    change(read_gguf_header(first), tensors_count=Int32(31))


def wrong_number(first: Path) -> None:
    change(read_gguf_header(first.with_name("m-00002-of-00003.gguf")), no=UInt16(2))


def wrong_type(first: Path) -> None:
    change(read_gguf_header(first), tensors_count=30)


@pytest.mark.parametrize(
    ("spoil", "words"), [(wrong_total, "hold 31 tensors"), (wrong_number, "shard 2 of 3, not 1 of 3")]
)
def test_wrong_split_keys_are_refused_and_mended(
    first: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    (tmp_path / "whole.gguf").unlink()
    spoil(first)
    with pytest.raises(InputFileError, match=words):
        describe(first)
    assert [(found.rule.name, found.mended_by) for found in examine(tmp_path)] == [("G30", "--fix")]
    with pytest.raises(RuntimeFailure):
        run(first)
    assert len(repair(tmp_path)) == 1
    assert examine(tmp_path) == []
    describe(first)


def test_a_wrongly_typed_key_stops_llama_cpp_until_it_is_mended(whole: Path, first: Path, tmp_path: Path) -> None:
    wrong_type(first)
    with pytest.raises(RuntimeFailure):
        run(first)
    assert [found.rule.name for found in examine(first)] == ["G30"]
    repair(first)
    rewrite_gguf(read_gguf(first), first, GgufChanges(entries={"llama.context_length": 1024}), overwrite=True)
    assert np.isfinite(run(first)).all()


def test_missing_and_renamed_shards(first: Path, tmp_path: Path) -> None:
    (tmp_path / "whole.gguf").unlink()
    other = first.with_name("other.gguf")
    shutil.copy(first, other)
    with pytest.raises(InputFileError, match="found by their names"):
        describe(other)
    assert [found.rule.name for found in examine(other)] == ["G30"]
    first.with_name("m-00002-of-00003.gguf").unlink()
    with pytest.raises(InputFileError, match=r"m-00002-of-00003.gguf cannot be read"):
        describe(first)
    assert "is missing" in examine(first)[0].detail


@pytest.mark.parametrize("count", [70000, -1])
def test_an_absurd_number_of_shards(gguf_file: Write, count: int) -> None:
    path = gguf_file(keys={"split.count": abs(count)})
    if count < 0:
        rewrite_gguf(read_gguf_header(path), path, GgufChanges(entries={"split.count": "many"}), overwrite=True)
    with pytest.raises(InputFileError, match="at most 4096"):
        describe(path)
