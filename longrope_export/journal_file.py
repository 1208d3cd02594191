"""An append-only file of JSON lines that survives interruption: searches and evaluations continue from theirs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from longrope_export.errors import OutputError, StaleStateError
from longrope_export.files import output_errors, sync_folder


class JournalFile:
    """Lines of JSON; `append` returns when its line is on the disk.

    Opening cuts off a torn last line before anything is appended, and gives the complete ones as `lines`. Only one
    process may have it open; `kind` ("search") is what its errors call the work. Raises `OutputError`.
    """

    def __init__(self, path: Path, kind: str) -> None:
        self.path = path
        self._file = _open(path, kind)
        try:
            self.lines = self._read()
        except BaseException:
            self._file.close()
            raise

    def append(self, value: Mapping[str, Any]) -> None:
        """Add one line; it is on the disk when this returns."""
        try:
            self._file.write(json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror or error}; what it holds is kept: run again"
            ) from error

    def close(self) -> None:
        """Give the file to the next process."""
        with contextlib.suppress(OSError):  # a line that a full disk refused is refused again
            self._file.close()

    def _read(self) -> list[bytes]:
        data = self._file.read()
        complete = data.rfind(b"\n") + 1
        if complete != len(data):
            self._file.truncate(complete)
        self._file.seek(complete)
        return data[:complete].splitlines()


def check_header(
    path: Path, stored: Mapping[str, Any], now: Mapping[str, Any], kind: str, ignored: Collection[str] = ()
) -> None:
    """Raise `StaleStateError`, naming the first field that differs, unless it is one of those in `ignored`."""
    ours, theirs = _flat(now, ignored), _flat(stored, ignored)
    for name in dict.fromkeys([*ours, *theirs]):
        if ours.get(name) != theirs.get(name):
            raise StaleStateError(
                f"{path} belongs to another {kind}: {name} is {_shown(theirs.get(name))} there and "
                f"{_shown(ours.get(name))} now; name another --out, or go on with what it was begun with"
            )


def _open(path: Path, kind: str) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise OutputError(f"{path} cannot be opened: {error.strerror or error}") from error
    file = os.fdopen(descriptor, "r+b")
    try:
        _lock(file)
    except OSError:
        file.close()
        raise OutputError(f"{path} is in use: another {kind} is writing it") from None
    with output_errors(path):
        sync_folder(path.parent)
    return file


def _lock(file: BinaryIO) -> None:
    # The system drops this lock when the process dies, however it dies.
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _flat(header: Mapping[str, Any], ignored: Collection[str], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in header.items():
        if not prefix and name in ignored:
            continue
        if isinstance(value, Mapping):
            result |= _flat(value, ignored, f"{prefix}{name}.")
        else:
            result[prefix + name] = json.loads(json.dumps(value))
    return result


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
