"""Writing files and folders so that nothing half-written is ever taken for finished."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from longrope_export.errors import InputFileError, OutputError

MANIFEST = "manifest.json"
_BLOCK = 1 << 20


@contextlib.contextmanager
def output_errors(target: Path) -> Iterator[None]:
    """Turn what the system refuses while `target` is written into an `OutputError` of one clear line."""
    try:
        yield
    except OSError as error:
        raise _output_error(target, error) from error


@contextlib.contextmanager
def atomic_output(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a sibling partial file for writing and reading; it becomes `path` only when the body succeeds.

    The file is flushed and synced, renamed over `path`, and the folder is synced; on any error it is removed. Its
    mode follows the umask. Raises `OutputError` when `path` exists (unless `overwrite`), when its folder is missing,
    or when the system refuses the write (full disk, permissions).
    """
    target = Path(path)
    partial = _partial(target)
    try:
        check_output(target, overwrite=overwrite)
        with partial.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise _output_error(target, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def check_output(target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` when the file `target` cannot be written: it exists (unless `overwrite`), or has no folder."""
    if target.is_dir():
        raise OutputError(f"{target} is a folder; name a file")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already; name another output or remove it first")
    if not target.parent.is_dir():
        raise OutputError(f"the folder {target.parent} does not exist; create it first")


def write_text(path: str | os.PathLike[str], text: str, *, overwrite: bool = False) -> None:
    """Write `text` as UTF-8 through `atomic_output`."""
    with atomic_output(path, overwrite=overwrite) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a sibling partial folder that gets its manifest and becomes `path` when the body succeeds.

    Raises `OutputError` when `path` exists and is not an empty folder, or when the system refuses a write.
    """
    target = Path(path)
    partial = _partial(target)
    try:
        if target.is_symlink() or target.is_file() or (target.is_dir() and any(target.iterdir())):
            raise OutputError(f"{target} exists already and is not an empty folder; name another output")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        yield partial
        write_manifest(partial)
        partial.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        raise _output_error(target, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(target: Path) -> Path:
    """A hidden sibling whose name fits wherever the target's own does."""
    return target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}.partial")


def write_manifest(folder: Path) -> None:
    """Write sizes and SHA-256 sums of every file below `folder`: the sign that the folder is complete."""
    entries = {
        str(file.relative_to(folder).as_posix()): {"size": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    write_text(folder / MANIFEST, json.dumps({"files": entries}, indent=2) + "\n", overwrite=True)


def check_manifest(folder: Path) -> dict[str, Any]:
    """Compare the folder with its manifest and return the manifest's entries.

    Raises `InputFileError` when the manifest is missing, or a file is missing or differs.
    """
    try:
        entries = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputFileError(f"{folder} has no readable {MANIFEST}: it was not finished; write it again") from None
    for name, expected in entries.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != expected["size"] or sha256(file) != expected["sha256"]:
            raise InputFileError(f"{file} is missing or differs from {folder / MANIFEST}; write the folder again")
    return dict(entries)


def sha256(path: Path) -> str:
    """Hex SHA-256 of the file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def folder_sha256(folder: Path, files: Iterable[Path] | None = None) -> str:
    """Hex SHA-256 over names and sums of a folder's files, whatever their dates; all of them unless `files` names some."""
    found = folder.rglob("*") if files is None else files
    sums = [f"{file.relative_to(folder).as_posix()}\0{sha256(file)}\n" for file in sorted(found) if file.is_file()]
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable, where the system can sync folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _output_error(target: Path, error: OSError) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"the disk is full: {target} was not written; free some room and run again")
    return OutputError(f"{target} was not written: {error.strerror or error}")
