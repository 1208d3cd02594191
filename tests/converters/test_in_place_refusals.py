"""What `patch --in-place` refuses, survives without a kill, writes, and says on the command line."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.cli.main import cli, main
from longrope_export.converters.gguf import in_place_change, in_place_room
from longrope_export.converters.gguf.in_place import patch_in_place, unpatch_in_place
from longrope_export.converters.gguf.in_place_copy import write_original
from longrope_export.converters.gguf.in_place_guard import opened_alone
from longrope_export.errors import InputFileError, LossyTargetError, OutputError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.unfinished import SPOILED_MAGIC, record_path

Record = Callable[..., RopeScaling]
Build = Callable[..., Path]

LONG, SHORT, STATIC = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
BLOCK = 4096


def refused(source: Path, scaling: RopeScaling, reason: str) -> None:
    """Both actions refuse in one line that offers a copy, and leave everything as it was."""
    before, names = source.read_bytes(), sorted(source.parent.iterdir())
    with pytest.raises(
        OutputError, match=rf"cannot be changed in place: {reason}.*; write a copy instead, with --out"
    ) as caught:
        patch_in_place(source, scaling)
    assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match=reason):
        patch_in_place(source, scaling, dry_run=True)
    assert source.read_bytes() == before
    assert sorted(source.parent.iterdir()) == names


def test_files_with_other_names_are_refused(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file()
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    refused(link, record(), "it is a link to .*model.gguf")
    (tmp_path / "second.gguf").hardlink_to(source)
    refused(source, record(), "it has 2 hard links")


@pytest.mark.parametrize("name", ["sha256-" + "0a" * 32, "sha256:" + "0a" * 32, "0a" * 32, "0a" * 20])
def test_blobs_of_download_caches_are_refused(gguf_file: Build, record: Record, tmp_path: Path, name: str) -> None:
    blob = tmp_path / "blobs" / name
    blob.parent.mkdir()
    gguf_file().rename(blob)
    refused(blob, record(), "it is a blob of a download cache")
    snapshot = tmp_path / "snapshots" / "model.gguf"
    snapshot.parent.mkdir()
    snapshot.symlink_to(blob)
    refused(snapshot, record(), "it is a blob of a download cache")


def test_open_and_mapped_files_are_refused(gguf_file: Build, record: Record) -> None:
    source = gguf_file()
    with source.open("rb") as file:
        refused(source, record(), "another program has it open or mapped")
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    refused(source, record(), "another program has it open or mapped")
    view.close()
    with source.open("rb") as file:
        other = subprocess.Popen(["sleep", "60"], stdin=file)
    try:
        refused(source, record(), "another program has it open or mapped")
    finally:
        other.kill()
        other.wait()
    patch_in_place(source, record())


def test_a_program_that_opens_the_file_meanwhile_waits(gguf_file: Build) -> None:
    source = gguf_file()
    with opened_alone(source):
        other = subprocess.Popen(["cat", source], stdout=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(0.5)
    assert other.communicate(timeout=30)[0] == source.read_bytes()


def test_a_file_that_changes_while_it_is_planned_is_left_alone(
    gguf_file: Build, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gguf_file()
    unit = in_place_room.room_unit

    def change_meanwhile(path: Path, alignment: int) -> int:
        os.utime(path, ns=(0, 0))
        return unit(path, alignment)

    monkeypatch.setattr("longrope_export.converters.gguf.in_place.room_unit", change_meanwhile)
    before = source.read_bytes()
    with pytest.raises(InputFileError, match="changed while it was read; run again"):
        patch_in_place(source, record())
    assert source.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a tmpfs")
def test_a_file_system_without_the_calls_is_refused_before_anything_is_written(
    gguf_file: Build, record: Record, tmp_path: Path
) -> None:
    source = gguf_file()
    before = source.read_bytes()
    folder = Path("/dev/shm") / f"in-place-{os.getpid()}"
    folder.mkdir()
    try:
        copy = Path(shutil.copy(source, folder))
        refused(copy, record(), "its file system cannot insert room")
        patch_in_place(source, record())
        shutil.copy(source, copy)
        with pytest.raises(OutputError, match=r"its file system cannot insert room .* with --out"):
            unpatch_in_place(copy)
        write_original(copy, folder / "original.gguf")
        assert (folder / "original.gguf").read_bytes() == before
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_refused_in_one_line(
    gguf_file: Build, record: Record, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    source = gguf_file()
    monkeypatch.setattr(sys, "platform", platform)
    refused(source, record(), "only Linux can insert room into a file")


def test_a_wide_alignment_is_refused(gguf_file: Build, record: Record) -> None:
    refused(gguf_file(alignment=1 << 20), record(), "its tensors are aligned to 1,048,576 bytes")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from longrope_export.converters.gguf import in_place_change
from longrope_export.cli.main import main
write = in_place_change.write_record
def limited(*arguments):
    write(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
in_place_change.write_record = limited
main(["patch", sys.argv[2], "--scaling", sys.argv[3], "--in-place"])
"""


@pytest.mark.parametrize("room", [0, 20, 60])
def test_a_write_that_the_system_refuses_is_undone(gguf_file: Build, record: Record, tmp_path: Path, room: int) -> None:
    (tmp_path / "r.json").write_text(record().to_json())
    source = gguf_file()
    before, names = source.read_bytes(), sorted(tmp_path.iterdir())
    command = [sys.executable, "-c", LIMITED, str(len(before) + room), str(source), str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"longrope: {source} was not changed: File too large; every byte is as it was\n"
    assert source.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == names


def test_an_interruption_from_the_keyboard_is_undone(
    gguf_file: Build, record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = gguf_file()
    before = source.read_bytes()
    shift = in_place_room.shift_data

    def interrupted(descriptor: int, length: int) -> None:
        shift(descriptor, length)
        if length > 0:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(in_place_change, "shift_data", interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch_in_place(source, record())
    assert source.read_bytes() == before
    assert not record_path(source).exists()


def test_an_undo_record_that_cannot_be_written_changes_nothing(gguf_file: Build, record: Record) -> None:
    source = gguf_file(name="m" * 240 + ".gguf")
    before = source.read_bytes()
    with pytest.raises(OutputError, match="was not changed: its undo record could not be written: File name too long"):
        patch_in_place(source, record())
    assert source.read_bytes() == before


def test_little_is_written(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file(keys={"tokenizer.ggml.merges": ["x" * 100] * 100_000})
    (tmp_path / "r.json").write_text(record().to_json())
    header = read_gguf_header(source).data_start
    for command in (
        ["patch", str(source), "--scaling", str(tmp_path / "r.json"), "--in-place"],
        ["unpatch", str(source)],
    ):
        script = (
            "import sys; from longrope_export.cli.main import main\n"
            "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
            "print(open('/proc/self/io').read(), file=sys.stderr)"
        )
        done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=True)
        for counter in ("wchar", "write_bytes"):
            found = re.search(rf"^{counter}: (\d+)", done.stderr, re.MULTILINE)
            assert found
            assert header < int(found[1]) <= 2 * header + (1 << 20), (command[0], counter)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [*map(str, arguments)])


def test_commands(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(record().to_json())
    source, scaling = gguf_file(), ("--scaling", tmp_path / "r.json")
    before = source.read_bytes()
    planned = json.loads(run("patch", source, *scaling, "--in-place", "--dry-run", "--json").stdout)
    assert planned["dry_run"] is True
    assert source.read_bytes() == before
    done = json.loads(run("patch", source, *scaling, "--in-place", "--json").stdout)
    assert done == {**planned, "dry_run": False}
    assert (done["path"], done["bytes"]) == (str(source), source.stat().st_size)
    assert done["inserted"] + done["appended"] == source.stat().st_size - len(before)
    assert "0 bytes inserted" in run("patch", source, *scaling, "--in-place").stdout
    patched = source.read_bytes()
    assert json.loads(run("unpatch", source, "--dry-run", "--json").stdout)["bytes"] == len(before)
    assert "would be as before" in run("unpatch", source, "--out", tmp_path / "o.gguf", "--dry-run").stdout
    assert not (tmp_path / "o.gguf").exists()
    assert run("unpatch", source, "--out", tmp_path / "o.gguf").exit_code == 0
    assert isinstance(run("unpatch", source, "--out", tmp_path / "o.gguf").exception, OutputError)
    assert run("unpatch", source, "--out", tmp_path / "o.gguf", "--overwrite").exit_code == 0
    assert (tmp_path / "o.gguf").read_bytes() == before
    assert source.read_bytes() == patched
    assert run("unpatch", source, "--overwrite").exit_code == 2
    assert "as before the patch" in run("unpatch", source).stdout
    assert source.read_bytes() == before


def test_dry_run_of_a_copy(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(record(long_start_tokens=4).to_json())
    source, out = gguf_file(), tmp_path / "new.gguf"
    command = ["patch", source, "--scaling", tmp_path / "r.json", "--out", out]
    assert isinstance(run(*command, "--dry-run").exception, LossyTargetError)
    planned = run(*command, "--dry-run", "--allow-lossy")
    assert "would become" in planned.stdout
    assert "lost:" in planned.stdout
    assert not out.exists()
    size = json.loads(run(*command, "--dry-run", "--allow-lossy", "--json").stdout)["bytes"]
    assert run(*command, "--allow-lossy").exit_code == 0
    assert out.stat().st_size == size
    assert isinstance(run(*command, "--dry-run", "--allow-lossy").exception, OutputError)
    assert run(*command, "--dry-run", "--allow-lossy", "--overwrite").exit_code == 0


def test_out_and_in_place_exclude_one_another(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(record().to_json())
    command = ["patch", gguf_file(), "--scaling", tmp_path / "r.json"]
    for wrong in ([], ["--in-place", "--out", tmp_path / "x.gguf"], ["--in-place", "--overwrite"]):
        assert run(*command, *wrong).exit_code == 2


def test_refusals_are_one_line_and_exit_1(
    gguf_file: Build, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(record().to_json())
    source = gguf_file()
    with source.open("rb"), pytest.raises(SystemExit) as stopped:
        main(["patch", str(source), "--scaling", str(tmp_path / "r.json"), "--in-place"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert hashlib.sha256(SPOILED_MAGIC).digest() != hashlib.sha256(source.read_bytes()[:4]).digest()
