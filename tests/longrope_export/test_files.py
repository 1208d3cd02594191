"""Output files appear whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longrope_export.errors import InputFileError, OutputError
from longrope_export.files import atomic_folder, atomic_output, check_manifest, sha256, write_text


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_output_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    with atomic_output(target) as file:
        file.write(b"abc")
        assert not target.exists()
    assert target.read_bytes() == b"abc"
    assert names(tmp_path) == ["out.bin"]


def test_error_leaves_the_old_file_and_no_partial(tmp_path: Path) -> None:
    target = tmp_path / "out.bin"
    target.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_output(target, overwrite=True) as file:
        file.write(b"new")
        raise RuntimeError
    assert target.read_bytes() == b"old"
    assert names(tmp_path) == ["out.bin"]


def test_existing_output_is_refused_unless_overwrite(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "1")
    with pytest.raises(OutputError, match="exists already"):
        write_text(tmp_path / "a", "2")
    write_text(tmp_path / "a", "2", overwrite=True)
    assert (tmp_path / "a").read_text() == "2"


def test_missing_folder_and_folder_as_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        write_text(tmp_path / "no" / "a", "1")
    with pytest.raises(OutputError, match="is a folder"):
        write_text(tmp_path, "1")


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "1")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    script = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from longrope_export.files import atomic_output\n"
        "from longrope_export.errors import OutputError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n"
        "    with atomic_output(Path(sys.argv[1]) / 'big') as file:\n"
        "        file.write(b'x' * 5000)\n"
        "except OutputError as error:\n"
        "    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "was not written" in result.stdout
    assert names(tmp_path) == []


def test_names_of_any_allowed_length(tmp_path: Path) -> None:
    write_text(tmp_path / ("a" * 255), "1")
    assert names(tmp_path) == ["a" * 255]
    with pytest.raises(OutputError, match="was not written: File name too long"):
        write_text(tmp_path / ("a" * 256), "1")
    with pytest.raises(OutputError, match="was not written: File name too long"), atomic_folder(tmp_path / ("a" * 256)):
        pass


def test_folder_is_complete_with_its_manifest(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text("a")
        assert not target.exists()
    assert check_manifest(target) == {"sub/a.txt": {"size": 1, "sha256": sha256(target / "sub" / "a.txt")}}
    with pytest.raises(OutputError, match="not an empty folder"), atomic_folder(target):
        pass


def test_changed_or_unfinished_folder_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as folder:
        (folder / "a").write_text("1")
    (target / "a").write_text("2")
    with pytest.raises(InputFileError, match="differs"):
        check_manifest(target)
    (target / "manifest.json").unlink()
    with pytest.raises(InputFileError, match="not finished"):
        check_manifest(target)


def test_failed_folder_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "deep" / "model") as folder:
        (folder / "a").write_text("1")
        raise RuntimeError
    assert names(tmp_path / "deep") == []
