"""`longrope patch FOLDER --in-place` and `unpatch`: what `export` writes, without copying a tensor, and every byte back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from killed import survives

from longrope_export import RopeScaling
from longrope_export.cli.main import cli, main, mend_unfinished
from longrope_export.converters import folder_in_place, folder_undo, safetensors_in_place
from longrope_export.converters.folder_in_place import patch_folder_in_place, unpatch_folder_in_place
from longrope_export.converters.folder_undo import UNDO_FILE
from longrope_export.converters.gguf import in_place_room
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.converters.safetensors import UNDO_KEY
from longrope_export.converters.safetensors_in_place import add_safetensors_metadata, restore_safetensors
from longrope_export.errors import InputFileError, LossyTargetError, OutputError, ScalingError
from longrope_export.files import check_manifest, write_manifest
from longrope_export.formats.records import read_scaling
from longrope_export.formats.safetensors_header import read_safetensors_header

Record = Callable[..., RopeScaling]
pytestmark = pytest.mark.usefixtures("quiet")
SHARD = "model.safetensors"


@pytest.fixture
def folder(small_llama: Path, tmp_path: Path) -> Path:
    place = Path(shutil.copytree(small_llama, tmp_path / "model"))
    tokenizer = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 512}))
    try:
        in_place_room.room_unit(place / SHARD, 8)
    except OutputError:
        pytest.skip("the file system cannot insert room")
    return place


def contents(place: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(place.iterdir())}


def data(path: Path) -> bytes:
    return path.read_bytes()[read_safetensors_header(path).data_start :]


def test_the_same_folder_as_a_copy_and_every_byte_back(folder: Path, record: Record, tmp_path: Path) -> None:
    before, inode = contents(folder), (folder / SHARD).stat().st_ino
    write_hf_folder(folder, tmp_path / "copy", record(32))
    assert patch_folder_in_place(folder, record(32), dry_run=True).shards == {SHARD: "inserted"}
    assert contents(folder) == before
    assert patch_folder_in_place(folder, record(32)).shards == {SHARD: "inserted"}
    copy, ours = contents(tmp_path / "copy"), contents(folder)
    assert (folder / SHARD).stat().st_ino == inode
    assert data(folder / SHARD) == data(tmp_path / "copy" / SHARD)
    for raw in (copy, ours):
        del raw[SHARD]
    assert ours.pop(UNDO_FILE)
    del copy["manifest.json"]
    assert ours == copy
    assert read_scaling(folder) == record(32)
    # a copy of the patched folder carries nothing to undo
    write_hf_folder(folder, tmp_path / "again", record(32))
    assert (tmp_path / "again" / SHARD).read_bytes() == (tmp_path / "copy" / SHARD).read_bytes()
    assert not (tmp_path / "again" / UNDO_FILE).exists()
    assert unpatch_folder_in_place(folder).shards == {SHARD: "removed"}
    assert contents(folder) == before


def test_patching_again_replaces_and_the_first_original_comes_back(folder: Path, record: Record) -> None:
    before = contents(folder)
    patch_folder_in_place(folder, record(32))
    first = contents(folder)
    assert patch_folder_in_place(folder, record(32, max_position_embeddings=4096)).shards == {SHARD: "room"}
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 4096
    patch_folder_in_place(folder, record(32))
    now = contents(folder)
    assert {name for name in now if now[name] != first[name]} <= {UNDO_FILE}
    unpatch_folder_in_place(folder)
    assert contents(folder) == before


def test_a_system_that_cannot_insert_room_copies_the_shard_and_copies_it_back(
    folder: Path, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    monkeypatch.setattr(in_place_room, "_fallocate", lambda: None)
    assert patch_folder_in_place(folder, record(32)).shards == {SHARD: "copied"}
    assert read_scaling(folder) == record(32)
    assert unpatch_folder_in_place(folder).shards == {SHARD: "copied"}
    assert contents(folder) == before


def test_a_manifest_is_renewed_and_brought_back(folder: Path, record: Record) -> None:
    write_manifest(folder)
    before = contents(folder)
    patch_folder_in_place(folder, record(32))
    assert SHARD in check_manifest(folder)
    unpatch_folder_in_place(folder)
    assert contents(folder) == before
    check_manifest(folder)


def test_killed_between_any_two_steps(folder: Path, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is the old or the new model for transformers, and `unpatch` goes on from there."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # SIGKILL loses no cached page, and syncs take time
    before, seen = contents(folder), set()
    for undo in (False, True):
        for step in range(1, 40):
            if undo:
                patch_folder_in_place(folder, record(32))
            alive = killed(folder, record(32), step, undo=undo)
            kind = json.loads((folder / "config.json").read_text()).get("longrope_export") is not None
            seen.add((undo, kind, alive))
            mend_unfinished([str(folder)])  # as every command does first
            if (folder / UNDO_FILE).exists():
                unpatch_folder_in_place(folder)
            assert contents(folder) == before, (undo, step)
            if alive:
                break
        assert alive
    died = {(undo, kind, False) for undo in (False, True) for kind in (False, True)}
    assert seen == died | {(False, True, True), (True, False, True)}


def killed(folder: Path, scaling: RopeScaling, step: int, *, undo: bool) -> bool:
    """Whether a child lived through the whole action; it dies before its step of that number."""
    calls = [(Path, "replace"), (Path, "unlink"), (safetensors_in_place, "carry_out")]

    def action() -> None:
        if undo:
            unpatch_folder_in_place(folder)
        else:
            patch_folder_in_place(folder, scaling)

    alive = survives(action, step, calls)
    for partial in folder.glob(".*.partial"):
        partial.unlink()
    return alive


def test_what_is_refused_changes_nothing(folder: Path, record: Record, tmp_path: Path) -> None:
    before = contents(folder)
    with pytest.raises(InputFileError, match="was not patched in place"):
        unpatch_folder_in_place(folder)
    with pytest.raises(LossyTargetError, match="n̂ = 4"):
        patch_folder_in_place(folder, record(32, long_start_tokens=4))
    with pytest.raises(ScalingError):
        patch_folder_in_place(folder, record(16))
    with (folder / SHARD).open("rb"), pytest.raises(OutputError, match="another program has it open"):
        patch_folder_in_place(folder, record(32))
    assert contents(folder) == before
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(OutputError, match=r"config.json is a link to .*longrope export"):
        patch_folder_in_place(folder, record(32))
    assert contents(folder) == before


def test_what_others_changed_since_is_kept(folder: Path, record: Record) -> None:
    patch_folder_in_place(folder, record(32))
    config = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(config.replace(b'"llama"', b'"mistral"'))
    for action in (lambda: patch_folder_in_place(folder, record(32)), lambda: unpatch_folder_in_place(folder)):
        with pytest.raises(InputFileError, match=r"config.json was edited since.*remove \.longrope-undo\.json"):
            action()
    (folder / "config.json").write_bytes(config)
    path = folder / SHARD
    undo = read_safetensors_header(path).metadata[UNDO_KEY]
    for wrong in ("", "!", undo[:-4], undo[4:], undo + "AAAA"):
        add_raw(path, {UNDO_KEY: wrong})
        with pytest.raises(InputFileError, match="is damaged or not about this file"):
            unpatch_folder_in_place(folder)
    add_raw(path, {UNDO_KEY: undo, "format": "other"})
    with pytest.raises(InputFileError, match="another tool has changed the file"):
        restore_safetensors(path)


def add_raw(path: Path, entries: dict[str, str]) -> None:
    """What another tool might do to the metadata."""
    raw = path.read_bytes()
    start = int.from_bytes(raw[:8], "little") + 8
    values = json.loads(raw[8:start])
    values["__metadata__"] |= entries
    text = json.dumps(values).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", '{"format": 1, "before": {"config.json": null}, "written": {}}',
        '{"format": 1, "before": {"../x": "", "config.json": "e30="}, "written": {}}',
        '{"format": 2, "before": {"config.json": "e30="}, "written": {}}',
        '{"format": 1, "before": {"config.json": "!"}, "written": {}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_hostile_undo_files_are_refused(folder: Path, record: Record, text: str) -> None:
    (folder / UNDO_FILE).write_text(text)
    before = contents(folder)
    for action in (lambda: patch_folder_in_place(folder, record(32)), lambda: unpatch_folder_in_place(folder)):
        with pytest.raises(InputFileError, match=r"is damaged, so .* cannot be brought back"):
            action()
    assert contents(folder) == before
    assert folder_undo.UNDO_FILE == folder_in_place.UNDO_FILE


def test_a_header_that_could_not_be_read_again_is_not_written(folder: Path, record: Record) -> None:
    before = contents(folder)
    with pytest.raises(OutputError, match="too long a header to take more in"):
        add_safetensors_metadata(folder / SHARD, {"long": os.urandom(200_000).hex()})
    assert contents(folder) == before


def test_commands(folder: Path, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.json").write_text(record(32).to_json())
    before, patch = contents(folder), ["patch", str(folder), "--scaling", str(tmp_path / "r.json"), "--in-place"]

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli, list(arguments))

    planned = json.loads(run(*patch, "--dry-run", "--json").stdout)
    assert (planned["shards"], planned["dry_run"]) == ({SHARD: "inserted"}, True)
    assert "would become window 512 → 2048" in run(*patch, "--dry-run").stdout
    assert contents(folder) == before
    assert f"{SHARD}: blocks inserted at the front" in run(*patch).stdout
    assert json.loads(run(*patch, "--json").stdout)["shards"] == {SHARD: "room"}
    assert run("unpatch", str(folder), "--out", str(tmp_path / "x")).exit_code == 2
    assert "would be as before" in run("unpatch", str(folder), "--dry-run").stdout
    assert json.loads(run("unpatch", str(folder), "--json").stdout)["shards"] == {SHARD: "removed"}
    assert contents(folder) == before
    (tmp_path / "r.json").write_text(record(32, long_start_tokens=4).to_json())
    assert "lost: transformers will rescale the first 4" in run(*patch, "--allow-lossy").stdout
    assert f"{SHARD}: blocks cut off" in run("unpatch", str(folder)).stdout
    with pytest.raises(SystemExit):
        main(["unpatch", str(folder)])
    assert capsys.readouterr().err.count("\n") == 1
