"""`examine`: every finding of a GGUF file, or of a folder's config.json and GGUF files."""

from __future__ import annotations

import os
from pathlib import Path

from longrope_export.converters.doctor.findings import Finding, worst_first
from longrope_export.converters.doctor.gguf import examine_gguf
from longrope_export.converters.doctor.hf import examine_config
from longrope_export.errors import InputFileError
from longrope_export.formats.records import CONFIG_FILE


def patients(path: str | os.PathLike[str]) -> list[Path]:
    """The files to look at: the file itself, or a folder's config.json and GGUF files, by name.

    Raises `InputFileError` when there are none.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise InputFileError(f"{place} does not exist; name a GGUF file, a config.json or a model folder")
    config = place / CONFIG_FILE
    found = [config] if config.is_file() else []
    found += sorted(file for file in place.iterdir() if file.suffix.lower() == ".gguf" and file.is_file())
    if not found:
        raise InputFileError(f"{place} holds neither {CONFIG_FILE} nor a .gguf file")
    return found


def examine_file(path: Path) -> list[Finding]:
    """Findings of one file, worst first: a .json file is a config, anything else a GGUF."""
    return worst_first(examine_config(path) if path.suffix.lower() == ".json" else examine_gguf(path))


def examine(path: str | os.PathLike[str]) -> list[Finding]:
    """Findings of a file or folder, by file, worst first; raises `InputFileError` when there is nothing to read."""
    return [finding for file in patients(path) for finding in examine_file(file)]
