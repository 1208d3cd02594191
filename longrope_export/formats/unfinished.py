"""How a file looks while it is changed in place: no program takes it for a model, and an undo record lies beside it."""

from __future__ import annotations

import os
from pathlib import Path

from longrope_export.errors import InputFileError

SPOILED_MAGIC = b"LRIP"
RECORD_SUFFIX = ".longrope-undo"


def record_path(path: Path) -> Path:
    """Where the undo record of the file at `path` lies while that file is changed in place."""
    return path.with_name(path.name + RECORD_SUFFIX)


def refuse_unfinished(path: Path) -> None:
    """Raise `InputFileError` when a change in place of `path` was cut short and not yet finished or undone.

    Call it with the file open: opening waits until a change that is still under way has ended.
    """
    record = record_path(path.resolve())
    # not Path.exists: a name that leaves no room for the suffix is no error
    if os.path.exists(record):  # noqa: PTH110
        raise InputFileError(
            f"{path} was being changed in place ({record.name}); run `longrope describe` on it to mend it"
        )


def unfinished_files(place: Path) -> list[Path]:
    """Files with an undo record beside them: the one that `place` leads to, or those in the folder `place`.

    `place` may be any text from a command line.
    """
    try:
        records = sorted(place.glob(f"*{RECORD_SUFFIX}")) if place.is_dir() else [record_path(place.resolve())]
        found = [record.with_name(record.name.removesuffix(RECORD_SUFFIX)) for record in records if record.is_file()]
        return [file for file in found if file.is_file()]
    except (OSError, ValueError, RuntimeError):
        return []
