"""The journal of an evaluation: a header line, then one line for each unit's answer; the same command goes on."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.errors import InputFileError
from longrope_export.evaluation.protocol import Value
from longrope_export.journal_file import JournalFile, check_header

FORMAT = "longrope-eval-journal/1"
_KIND = "evaluation"
_ARRAY = "float32"


class EvaluationJournal:
    """Answers by row and unit; with a `path` they are on the disk as soon as `append` returns.

    `header` names what fixes the answers. A journal that was begun with another one raises `StaleStateError` with the
    field's name; a file that is no journal raises `InputFileError`.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.values: dict[str, dict[str, Value]] = {}
        self._file = JournalFile(path, _KIND) if path else None
        try:
            self._begin(header)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EvaluationJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def row(self, name: str) -> dict[str, Value]:
        """What is known of a row, by unit key."""
        return self.values.setdefault(name, {})

    def append(self, row: str, key: str, value: Value, seconds: float) -> None:
        """Keep one answer."""
        self.row(row)[key] = value
        if self._file:
            self._file.append({"row": row, "unit": key, "value": _written(value), "seconds": round(seconds, 3)})

    def close(self) -> None:
        """Give the file to the next process."""
        if self._file:
            self._file.close()

    def _begin(self, header: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        if not self._file.lines:
            self._file.append({"format": FORMAT, **header})
            return
        for number, line in enumerate(self._file.lines):
            self._take(number, line, header)
        self._file.lines = []

    def _take(self, number: int, line: bytes, header: Mapping[str, Any]) -> None:
        assert self._file is not None
        try:
            entry = json.loads(line)
            if number:
                self.row(entry["row"])[entry["unit"]] = _read(entry["value"])
                return
            if entry["format"] != FORMAT:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputFileError(
                f"{self._file.path} is not an evaluation's journal: line {number + 1} is not valid; name another --out"
            ) from None
        check_header(self._file.path, entry, header, _KIND, ignored=("format",))


def _written(value: Value) -> dict[str, Any]:
    return {name: _encoded(entry) if isinstance(entry, np.ndarray) else entry for name, entry in value.items()}


def _encoded(values: Any) -> dict[str, str]:
    return {_ARRAY: base64.b64encode(np.asarray(values, dtype="<f4").tobytes()).decode()}


def _read(value: Mapping[str, Any]) -> Value:
    return {name: _decoded(entry) if _is_array(entry) else entry for name, entry in value.items()}


def _is_array(entry: Any) -> bool:
    return isinstance(entry, dict) and set(entry) == {_ARRAY}


def _decoded(entry: Mapping[str, str]) -> Any:
    return np.frombuffer(base64.b64decode(entry[_ARRAY], validate=True), dtype="<f4").astype(np.float32)


def journal_path(folder: str | os.PathLike[str]) -> Path:
    """Where the journal of an evaluation into `folder` stands."""
    return Path(folder) / "journal.jsonl"
