"""The append-only journal of a search: a header line, then one fsynced JSON line per (candidate, document) loss."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from longrope_export.errors import InputFileError, OutputError, StaleStateError
from longrope_export.search.protocol import Outcome, Trial

FORMAT = "longrope-search-journal/1"
# Decided once, from measured times: a resumed search takes it from the journal instead of comparing it.
PLAN = "plan"


class Journal:
    """What has been measured, by the number of the trial in the order in which the search asked for it.

    Opening cuts off a torn last line before anything is appended. Only one process may have a journal open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] | None = None
        self.entries: dict[int, tuple[list[Any], Outcome]] = {}
        self._file = _open(path)
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a line that a full disk refused is refused again
            self._file.close()

    def check(self, header: Mapping[str, Any]) -> None:
        """Raise `StaleStateError`, naming the field, unless the journal's header equals `header` but for the plan."""
        assert self.header is not None
        ours, theirs = _flat(header), _flat(self.header)
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                raise StaleStateError(
                    f"{self.path} belongs to another search: {name} is {_shown(theirs.get(name))} there and "
                    f"{_shown(ours.get(name))} now; name another --out, or search again with what it was begun with"
                )

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the header of a new journal."""
        self.header = {"format": FORMAT, **header}
        self._append(self.header)

    def recorded(self, number: int, trial: Trial) -> Outcome | None:
        """The outcome of trial `number`, or None; raises `StaleStateError` when another trial stands there."""
        if number not in self.entries:
            return None
        stored, outcome = self.entries[number]
        if stored != trial.to_json():
            raise StaleStateError(
                f"{self.path} cannot be continued: its trial {number} is not the one that this search proposes "
                "(the journal was edited, or the program changed); name another --out"
            )
        return outcome

    def append(self, number: int, trial: Trial, outcome: Outcome, seconds: float) -> None:
        """Add one outcome; it is on the disk when this returns."""
        self.entries[number] = (trial.to_json(), outcome)
        line: dict[str, Any] = {"trial": number, "of": trial.to_json(), "loss": _written(outcome.loss)}
        if outcome.gradient is not None:
            line["gradient"] = [_written(value) for value in outcome.gradient]
        self._append({**line, "seconds": round(seconds, 3)})

    def _append(self, value: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written: {error.strerror or error}; what it holds is kept: run again"
            ) from error

    def _read(self) -> None:
        data = self._file.read()
        complete = data.rfind(b"\n") + 1
        if complete != len(data):
            self._file.truncate(complete)
        self._file.seek(complete)
        for number, line in enumerate(data[:complete].splitlines()):
            self._take(number, line)

    def _take(self, number: int, line: bytes) -> None:
        try:
            value = json.loads(line)
            if number == 0:
                if value["format"] != FORMAT:
                    raise ValueError
                self.header = dict(value)
                return
            gradient = value.get("gradient")
            known = None if gradient is None else tuple(_read_real(part) for part in gradient)
            self.entries[int(value["trial"])] = (list(value["of"]), Outcome(_read_real(value["loss"]), known))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputFileError(f"{self.path} is not a search journal: line {number + 1} is not valid") from None


def _open(path: Path) -> BinaryIO:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise OutputError(f"{path} cannot be opened: {error.strerror or error}") from error
    file = os.fdopen(descriptor, "r+b")
    try:
        _lock(file)
    except OSError:
        file.close()
        raise OutputError(f"{path} is in use: another search is writing it") from None
    return file


def _lock(file: BinaryIO) -> None:
    # The system drops this lock when the process dies, however it dies.
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


def _written(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read_real(value: Any) -> float:
    return math.inf if value is None else float(value)


def _flat(header: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in header.items():
        if not prefix and name in (PLAN, "format"):
            continue
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = json.loads(json.dumps(value))
    return result


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
