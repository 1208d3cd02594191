"""The file `.longrope-undo.json` of a model folder that was changed in place: its small files as they were."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.files import MANIFEST, atomic_output, output_errors, write_text
from longrope_export.formats.records import CONFIG_FILE, RECORD_FILE

UNDO_FILE = ".longrope-undo.json"
# What may be brought back, and nothing beside the folder; a manifest is about the others.
SMALL_FILES = (CONFIG_FILE, RECORD_FILE, "tokenizer_config.json", "generation_config.json", MANIFEST)
_FORMAT = 1
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class FolderUndo:
    """Bytes of the small files before the first change (None: not there), and hashes of all that was written since."""

    before: Mapping[str, bytes | None]
    written: Mapping[str, tuple[str, ...]]

    @property
    def config(self) -> dict[str, Any]:
        """The former config.json; raises `InputFileError` when it is none."""
        try:
            values = json.loads(self.before[CONFIG_FILE] or b"")
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise InputFileError(f"{UNDO_FILE} holds no {CONFIG_FILE} that can be read")
        return values


def take_undo(folder: Path) -> FolderUndo:
    """What would bring the folder's small files back, as they are now."""
    found = {name: _read(folder / name) for name in SMALL_FILES if name != MANIFEST or (folder / name).exists()}
    return FolderUndo(found, {})


def read_undo(folder: Path) -> FolderUndo | None:
    """The folder's undo file, or None; raises `InputFileError` when it is damaged."""
    path = folder / UNDO_FILE
    if not path.exists():
        return None
    try:
        if path.is_symlink() or path.stat().st_size > _MAX_BYTES:
            raise ValueError("not ours")
        return _checked(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputFileError(f"{path} is damaged, so {folder} cannot be brought back") from None


def write_undo(folder: Path, undo: FolderUndo, texts: Mapping[str, str]) -> None:
    """Write the undo file, before `texts` are written into the folder by name."""
    written = {
        name: sorted({*undo.written.get(name, ()), hashlib.sha256(text.encode()).hexdigest()})
        for name, text in texts.items()
    }
    before = {name: None if raw is None else base64.b64encode(raw).decode() for name, raw in undo.before.items()}
    values = {"format": _FORMAT, "before": before, "written": {**undo.written, **written}}
    write_text(folder / UNDO_FILE, json.dumps(values, indent=1), overwrite=True)


def check_unedited(folder: Path, undo: FolderUndo) -> None:
    """Raise `InputFileError` when a small file is neither what was written nor what it was before."""
    for name, before in undo.before.items():
        raw = _read(folder / name)
        if name == MANIFEST or raw in (None, before):
            continue
        if hashlib.sha256(raw or b"").hexdigest() not in undo.written.get(name, ()):
            raise InputFileError(
                f"{folder / name} was edited since the folder was patched; remove {UNDO_FILE} to keep it so for good"
            )


def bring_back(folder: Path, undo: FolderUndo) -> None:
    """Restore the small files, config.json first: from then on the model is the old one."""
    for name, raw in sorted(undo.before.items(), key=lambda item: item[0] != CONFIG_FILE):
        if raw is not None:
            with atomic_output(folder / name, overwrite=True) as file:
                file.write(raw)
        else:
            with output_errors(folder / name):
                (folder / name).unlink(missing_ok=True)


def _checked(values: dict[str, Any]) -> FolderUndo:
    before = {
        name: None if text is None else base64.b64decode(text, validate=True) for name, text in values["before"].items()
    }
    if values["format"] != _FORMAT or not set(before) <= set(SMALL_FILES) or before.get(CONFIG_FILE) is None:
        raise ValueError("not of this version")
    return FolderUndo(before, {name: tuple(map(str, hashes)) for name, hashes in values["written"].items()})


def _read(path: Path) -> bytes | None:
    if not path.exists():
        return None
    if path.stat().st_size > _MAX_BYTES // 8:
        raise InputFileError(f"{path} has {path.stat().st_size:,} bytes, too many to remember")
    return path.read_bytes()
