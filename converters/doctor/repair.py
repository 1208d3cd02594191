"""`repair`: what `--fix` does, in one rewrite per file; the file is replaced only when the new one is complete."""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope_export.converters.doctor.examine import examine_file, patients
from longrope_export.converters.doctor.findings import ConfigChanges, Finding
from longrope_export.converters.doctor.gguf_shards_check import split
from longrope_export.converters.gguf.checks import check_patchable, window_losses
from longrope_export.converters.gguf.rewrite import GgufChanges, rewrite_gguf
from longrope_export.converters.gguf.scaling_keys import scaling_changes
from longrope_export.converters.hf_config import extended_config, json_text
from longrope_export.errors import LossyTargetError
from longrope_export.files import MANIFEST, sha256, write_text
from longrope_export.formats.gguf_header import GgufHeader, read_gguf_header
from longrope_export.formats.hf_config import read_json, text_config
from longrope_export.formats.hf_scaling import RECORD_KEY
from longrope_export.formats.records import CONFIG_FILE, RECORD_FILE
from longrope_export.scaling import RopeScaling


def repair(path: str | os.PathLike[str], scaling: RopeScaling | None = None) -> list[Path]:
    """Mend what can be mended in a file or folder, with `scaling` also what needs a record.

    Returns the files that were replaced. Raises `InputFileError`, `OutputError`, and with a record what
    `check_patchable` and `extended_config` raise.
    """
    changed = [file for file in patients(path) if _repair_file(file, examine_file(file), scaling)]
    for file in changed:
        _refresh_manifest(file.parent, file.name)
    return changed


def _repair_file(file: Path, findings: list[Finding], scaling: RopeScaling | None) -> bool:
    needs_record = scaling is not None and any(found.record_mends for found in findings)
    record = scaling if needs_record else None
    changes = [found.changes for found in findings if found.changes is not None]
    if not changes and record is None:
        return False
    if file.suffix.lower() == ".json":
        _repair_config(file, [item for item in changes if isinstance(item, ConfigChanges)], record)
    else:
        _repair_gguf(file, merged([item for item in changes if isinstance(item, GgufChanges)]), record)
    return True


def merged(changes: list[GgufChanges]) -> GgufChanges:
    """One rewrite that does all of them; what is set or added is not removed."""
    entries = {key: value for item in changes for key, value in item.entries.items()}
    vectors = {name: values for item in changes for name, values in item.vectors.items()}
    removed = frozenset().union(*(item.removed for item in changes))
    dropped = frozenset().union(*(item.dropped for item in changes))
    rows = {name: order for item in changes for name, order in item.rows.items()}
    return GgufChanges(entries, removed, dropped, vectors, rows)


def _repair_gguf(file: Path, changes: GgufChanges, scaling: RopeScaling | None) -> None:
    if scaling is None:
        rewrite_gguf(_whole(file), file, changes, overwrite=True)
        return
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".doctor-") as name:
        source = file
        if changes:
            source = Path(name) / file.name
            rewrite_gguf(_whole(file), source, changes)
        header = _whole(source)
        _refuse_losses(header, file, scaling)
        rewrite_gguf(header, file, scaling_changes(header, scaling), overwrite=True)


def _whole(file: Path) -> GgufHeader:
    """The header with the other shards', however wrong their split keys are; a shard that is not the first, alone."""
    header = read_gguf_header(file)
    return split(header)[1] or header


def _refuse_losses(header: GgufHeader, file: Path, scaling: RopeScaling) -> None:
    """As `patch_gguf` does, except that the file's own window does not count: it may be what is wrong."""
    losses = check_patchable(header, scaling, allow_lossy=True)
    if left := [line for line in losses if line not in window_losses(header, scaling)]:
        raise LossyTargetError(f"{file} cannot hold this record: {'; '.join(left)}; see `longrope patch --allow-lossy`")


def _repair_config(file: Path, changes: list[ConfigChanges], scaling: RopeScaling | None) -> None:
    config = copy.deepcopy(read_json(file))
    for item in changes:
        apply(config, item)
    if scaling is not None:
        config = extended_config(_without_rope(config), scaling)
        _write_beside(file, scaling)
    write_text(file, json_text(config), overwrite=True)


def apply(config: dict[str, Any], changes: ConfigChanges) -> None:
    """Set and remove the named paths in `config`."""
    for path, value in changes.entries.items():
        inner, key = _parent(config, path)
        inner[key] = copy.deepcopy(value)
    for path in changes.removed:
        inner, key = _parent(config, path)
        inner.pop(key, None)


def _parent(config: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *parts, key = path.split("/")
    for part in parts:
        config = config[part]
    return config, key


def _without_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without rope parameters and without our record; base and rotated part stay, at the top level."""
    text = text_config(config)
    result = {key: value for key, value in text.items() if key not in ("rope_scaling", "rope_parameters", RECORD_KEY)}
    for place in ("rope_parameters", "rope_scaling"):
        values = text.get(place)
        if isinstance(values, Mapping):
            kept = {key: values.get(key) for key in ("rope_theta", "partial_rotary_factor")}
            result |= {key: value for key, value in kept.items() if value is not None}
    rest = {key: value for key, value in config.items() if key != RECORD_KEY}
    return {**rest, "text_config": result} if config.get("text_config") else result


def _write_beside(file: Path, scaling: RopeScaling) -> None:
    """A longrope.json that is there already must not contradict the config."""
    record = file.parent / RECORD_FILE
    if file.name == CONFIG_FILE and record.is_file():
        write_text(record, scaling.to_json(), overwrite=True)
        _refresh_manifest(file.parent, RECORD_FILE)


def _refresh_manifest(folder: Path, name: str) -> None:
    """Give the replaced file its new size and sum in the folder's manifest, where there is one."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    values = read_json(manifest)
    if isinstance(values.get("files"), dict) and name in values["files"]:
        file = folder / name
        values["files"][name] = {"size": file.stat().st_size, "sha256": sha256(file)}
        write_text(manifest, json.dumps(values, indent=2) + "\n", overwrite=True)
