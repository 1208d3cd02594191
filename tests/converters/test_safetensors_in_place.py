"""`add_safetensors_metadata`: no tensor byte moves within the data, and a stopped change is mended."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from killed import survives
from safetensors import safe_open
from safetensors.numpy import save_file

from longrope_export import RopeScaling
from longrope_export.cli.main import main
from longrope_export.converters import safetensors_in_place
from longrope_export.converters.gguf import in_place_room
from longrope_export.converters.safetensors import UNDO_KEY
from longrope_export.converters.safetensors_in_place import add_safetensors_metadata, restore_safetensors
from longrope_export.errors import InputFileError, OutputError
from longrope_export.formats.records import SAFETENSORS_KEY, read_scaling
from longrope_export.formats.safetensors_header import read_safetensors_header
from longrope_export.formats.unfinished import record_path

Record = Callable[..., RopeScaling]
LONG = {"long": "x" * 3000}


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    tensors = {"a": generator.standard_normal((50, 70)).astype(np.float32), "b": np.arange(7, dtype=np.float16)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt", "note": "kept"})
    if not inserts(tmp_path / "m.safetensors"):
        pytest.skip("the file system cannot insert room")
    return tmp_path / "m.safetensors"


def inserts(path: Path) -> bool:
    try:
        return in_place_room.room_unit(path, 8) > 0
    except OutputError:
        return False


def data(path: Path) -> bytes:
    return path.read_bytes()[read_safetensors_header(path).data_start :]


def test_room_is_inserted_once_and_used_again(shard: Path) -> None:
    before, inode, tensors = data(shard), shard.stat().st_ino, dict(read_safetensors_header(shard).tensors)
    assert add_safetensors_metadata(shard, LONG) == "inserted"
    size = shard.stat().st_size
    assert add_safetensors_metadata(shard, {"ä": "\u2028"}) == "room"
    assert (shard.stat().st_size, shard.stat().st_ino) == (size, inode)
    assert data(shard) == before
    header = read_safetensors_header(shard)
    metadata = {key: value for key, value in header.metadata.items() if key != UNDO_KEY}
    assert metadata == {"format": "pt", "note": "kept", "ä": "\u2028", **LONG}
    assert dict(header.tensors) == tensors
    assert header.header_size % 8 == 0
    with safe_open(shard, "np") as opened:
        assert opened.metadata()["ä"] == "\u2028"
        assert opened.get_tensor("a").tobytes() == before[:14000]
    assert list(shard.parent.iterdir()) == [shard]


def test_the_first_original_comes_back(shard: Path) -> None:
    before = shard.read_bytes()
    add_safetensors_metadata(shard, LONG)
    add_safetensors_metadata(shard, {"more": "y" * 9000})
    assert restore_safetensors(shard, dry_run=True) == "removed"
    assert restore_safetensors(shard) == "removed"
    assert shard.read_bytes() == before
    with pytest.raises(InputFileError, match="carries nothing to undo"):
        restore_safetensors(shard)


def test_spaces_behind_the_header_are_room(shard: Path, record: Record) -> None:
    """As other tools reserve it: no byte is inserted, whatever the file system can."""
    raw, start = shard.read_bytes(), read_safetensors_header(shard).data_start
    roomy = raw[8:start].ljust(start + 4000 - 8)
    shard.write_bytes(len(roomy).to_bytes(8, "little") + roomy + raw[start:])
    size = shard.stat().st_size
    assert add_safetensors_metadata(shard, {SAFETENSORS_KEY: record().to_json()}) == "room"
    assert shard.stat().st_size == size
    assert read_scaling(shard) == record()
    assert restore_safetensors(shard) == "room"
    assert shard.read_bytes() == len(roomy).to_bytes(8, "little") + roomy + raw[start:]


def test_without_inserting_one_copy_is_made(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, inode = data(shard), shard.stat().st_ino
    monkeypatch.setattr(in_place_room, "_fallocate", lambda: None)
    assert add_safetensors_metadata(shard, LONG) == "copied"
    assert data(shard) == before
    assert shard.stat().st_ino != inode
    assert read_safetensors_header(shard).metadata["long"] == LONG["long"]
    assert list(shard.parent.iterdir()) == [shard]


def test_other_names_and_other_readers_are_refused(shard: Path, tmp_path: Path) -> None:
    raw = shard.read_bytes()
    link = tmp_path / "link.safetensors"
    link.symlink_to(shard)
    with pytest.raises(OutputError, match="it is a link to"):
        add_safetensors_metadata(link, LONG)
    with shard.open("rb"), pytest.raises(OutputError, match="another program has it open"):
        add_safetensors_metadata(shard, LONG)
    with pytest.raises(InputFileError, match=r"does not exist|cannot be read"):
        add_safetensors_metadata(tmp_path / "none.safetensors", LONG)
    (tmp_path / "hard.safetensors").hardlink_to(shard)
    with pytest.raises(OutputError, match="2 hard links"):
        add_safetensors_metadata(shard, LONG)
    assert shard.read_bytes() == raw


@pytest.mark.parametrize("room", [0, 4000])
def test_killed_before_every_call(shard: Path, room: int) -> None:
    """A child dies by SIGKILL before each system call in turn; the next command brings the old or the new file."""
    start, raw = read_safetensors_header(shard).data_start, shard.read_bytes()
    header = raw[8:start].ljust(start - 8 + room)
    before = len(header).to_bytes(8, "little") + header + raw[start:]
    shard.write_bytes(before)
    add_safetensors_metadata(shard, LONG)
    after, seen = shard.read_bytes(), set()
    for step in range(1, 60):
        shard.unlink()
        shard.write_bytes(before)
        done = killed(shard, step)
        left = shard.read_bytes()
        if left not in (before, after):
            with pytest.raises(InputFileError):
                read_safetensors_header(shard)
        with contextlib.suppress(SystemExit):
            main(["read", str(shard)])
        assert shard.read_bytes() in (before, after), step
        assert not record_path(shard).exists()
        seen.add((left in (before, after), shard.read_bytes() == after))
        if done:
            break
    assert done
    assert seen == {(True, False), (False, False), (True, True)}


def killed(shard: Path, step: int) -> bool:
    """Whether a child added the metadata before its call number `step`, at which it would have died."""
    calls = [(os, name) for name in ("pwrite", "fsync", "ftruncate", "unlink")]
    return survives(lambda: add_safetensors_metadata(shard, LONG), step, [*calls, (in_place_room, "_call")])


def test_a_file_that_changes_meanwhile_is_refused(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = safetensors_in_place._identity
    raw, seen = shard.read_bytes(), []

    def other(status: os.stat_result) -> tuple[int, ...]:
        seen.append(status)
        return (*identity(status), len(seen))

    monkeypatch.setattr(safetensors_in_place, "_identity", other)
    with pytest.raises(InputFileError, match="changed while it was read"):
        add_safetensors_metadata(shard, LONG)
    assert shard.read_bytes() == raw
    assert json.loads(raw[8 : read_safetensors_header(shard).data_start])["__metadata__"]["note"] == "kept"
