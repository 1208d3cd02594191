"""Factor lists in text files, as microsoft/LongRoPE writes them: one value per line, or one line per layer."""

from __future__ import annotations

import re
from pathlib import Path

from longrope_export.errors import InputFileError, ScalingError
from longrope_export.scaling import MAX_ROTARY_DIM

MAX_BYTES = 1 << 24
_SEPARATOR = re.compile(r"[,;\s]+")


def read_factor_csv(path: Path, pairs: int) -> tuple[float, ...]:
    """The `pairs` divisors λ in a CSV file: as many lines of one value, or lines of `pairs` values.

    Lines stand for layers; equal ones are one set. Raises `InputFileError` for a file that is no such table,
    `ScalingError` when layers differ, because no runtime rotates layers differently.
    """
    rows = _rows(path)
    if all(len(row) == 1 for row in rows) and (len(rows) > 1 or pairs == 1):
        rows = [tuple(row[0] for row in rows)]
    for number, row in enumerate(rows):
        if len(row) != pairs:
            raise InputFileError(
                f"{path} has {len(row)} factors{f' in line {number + 1}' if number else ''}, the model needs {pairs}"
            )
    for layer, row in enumerate(rows):
        if row != rows[0]:
            pair = next(index for index in range(pairs) if row[index] != rows[0][index])
            raise ScalingError(
                f"{path} has other factors for layer {layer} than for layer 0 (pair {pair}: {row[pair]:g}, "
                f"{rows[0][pair]:g}); no runtime rotates layers differently: give one line"
            )
    return rows[0]


def _rows(path: Path) -> list[tuple[float, ...]]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputFileError(f"{path} has over {MAX_BYTES:,} bytes; it is no list of factors")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError:
        raise InputFileError(f"{path} is not a text file; a list of factors is one number per line") from None
    lines = [line.split("#")[0].strip().strip(",;") for line in text.splitlines()]
    rows = [_numbers(path, number + 1, line) for number, line in enumerate(lines) if line]
    if not rows:
        raise InputFileError(f"{path} holds no factors")
    return rows


def _numbers(path: Path, number: int, line: str) -> tuple[float, ...]:
    words = _SEPARATOR.split(line)
    if len(words) > MAX_ROTARY_DIM:
        raise InputFileError(f"{path}, line {number}: {len(words)} values are more than a model has pairs")
    try:
        return tuple(float(word) for word in words)
    except ValueError:
        wrong = next(word for word in words if not _is_number(word))
        raise InputFileError(f"{path}, line {number}: {wrong[:40]!r} is not a number") from None


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
