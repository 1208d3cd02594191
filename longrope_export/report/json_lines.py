"""Reading a stranger's file of JSON lines one by one, with its size and every line's bounded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.report.fields import Fields

MAX_BYTES = 1 << 29
MAX_LINE = 1 << 20


def json_lines(path: Path) -> Iterator[Fields]:
    """The objects in `path`, one a line; a torn last line, which a killed process leaves, is passed over.

    Raises `InputFileError`, naming the line, for one that is no JSON object, and for a file or a line that is too long.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputFileError(f"it has over {MAX_BYTES:,} bytes; that is no journal of this project")
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE):
                number += 1
                if not line.endswith(b"\n") and len(line) < MAX_LINE:
                    return
                yield _object(line, number)
    except OSError as error:
        raise InputFileError(f"it cannot be read: {error.strerror or error}") from error


def _object(line: bytes, number: int) -> Fields:
    if not line.endswith(b"\n"):
        raise InputFileError(f"line {number} has over {MAX_LINE:,} bytes")
    try:
        return Fields(json.loads(line, parse_constant=_refuse), f"line {number}")
    except (ValueError, RecursionError):
        raise InputFileError(f"line {number} is not valid JSON") from None


def _refuse(constant: str) -> Any:
    raise ValueError(constant)
