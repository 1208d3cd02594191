"""The append-only journal of a search: a header line, then one fsynced JSON line per (candidate, document) loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError, StaleStateError
from longrope_export.journal_file import JournalFile, check_header
from longrope_export.search.protocol import Outcome, Trial

FORMAT = "longrope-search-journal/1"
# Decided once, from measured times: a resumed search takes it from the journal instead of comparing it.
PLAN = "plan"
# What the search was begun with; the same search may be continued in other words.
COMMAND = "command"


class Journal:
    """What has been measured, by the number of the trial in the order in which the search asked for it.

    Opening cuts off a torn last line before anything is appended. Only one process may have a journal open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: dict[str, Any] | None = None
        self.entries: dict[int, tuple[list[Any], Outcome]] = {}
        self._file = JournalFile(path, "search")
        try:
            for number, line in enumerate(self._file.lines):
                self._take(number, line)
        except BaseException:
            self._file.close()
            raise
        self._file.lines = []

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def check(self, header: Mapping[str, Any]) -> None:
        """Raise `StaleStateError`, naming the field, unless the journal's header equals `header` but for plan and command."""
        assert self.header is not None
        check_header(self.path, self.header, header, "search", ignored=(PLAN, COMMAND, "format"))

    def begin(self, header: Mapping[str, Any]) -> None:
        """Write the header of a new journal."""
        self.header = {"format": FORMAT, **header}
        self._file.append(self.header)

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
        self._file.append({**line, "seconds": round(seconds, 3)})

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


def _written(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _read_real(value: Any) -> float:
    return math.inf if value is None else float(value)
