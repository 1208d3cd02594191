"""`read_scaling`: the record, from whichever file carries it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from longrope_export.errors import InputFileError, LongRopeError, ScalingError
from longrope_export.formats.gguf_header import MAGIC
from longrope_export.formats.gguf_scaling import scaling_from_gguf
from longrope_export.formats.gguf_shards import read_gguf
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.hf_scaling import check_agreement, own_record, scaling_from_config
from longrope_export.formats.safetensors_header import read_safetensors_header
from longrope_export.scaling import RopeScaling

RECORD_FILE = "longrope.json"
CONFIG_FILE = "config.json"
SAFETENSORS_KEY = "longrope_export.scaling"


def read_scaling(path: str | os.PathLike[str]) -> RopeScaling:
    """The record in a longrope.json, a config.json, a GGUF, a .safetensors file, or a folder holding some
    of them.

    In a folder every source must agree; the most complete one (longrope.json, then config.json) is
    returned. Raises `InputFileError` when there is no record, the file is malformed, or sources disagree.
    """
    source = Path(path)
    if source.is_dir():
        return _from_folder(source)
    scaling = read_file(source)
    if scaling is None:
        raise InputFileError(f"{source} carries no longrope scaling; see `longrope describe {source}`")
    return scaling


def read_file(path: Path) -> RopeScaling | None:
    """The record in one file, or None when the file is sound but carries none."""
    if not path.is_file():
        raise InputFileError(
            f"{path} does not exist; name a longrope.json, a GGUF, a .safetensors file or a model folder"
        )
    try:
        return _read_by_kind(path)
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except LongRopeError as error:
        kind = InputFileError if isinstance(error, ScalingError) else type(error)
        message = str(error).removeprefix("config.json: ")
        raise kind(message if str(path) in message else f"{path}: {message}") from None


def _read_by_kind(path: Path) -> RopeScaling | None:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == MAGIC or path.suffix == ".gguf":
        return scaling_from_gguf(read_gguf(path))
    if path.suffix == ".safetensors":
        return scaling_from_metadata(read_safetensors_header(path).metadata)
    return _from_json(path)


def scaling_from_metadata(metadata: Mapping[str, str]) -> RopeScaling | None:
    """The record in safetensors metadata, or None; raises `ScalingError` when it is not valid."""
    text = metadata.get(SAFETENSORS_KEY)
    return None if text is None else RopeScaling.from_json(text)


def _from_json(path: Path) -> RopeScaling | None:
    values = read_json(path)
    return RopeScaling.from_dict(values) if "format" in values else scaling_from_config(values)


def _from_folder(folder: Path) -> RopeScaling:
    candidates = [
        folder / RECORD_FILE,
        folder / CONFIG_FILE,
        *sorted(folder.glob("*.safetensors")),
        *sorted(folder.glob("*.gguf")),
    ]
    found = [(path, scaling) for path in candidates if path.is_file() and (scaling := read_file(path)) is not None]
    if not found:
        raise InputFileError(f"{folder} carries no longrope scaling; see `longrope describe {folder}`")
    first_path, first = found[0]
    for path, scaling in found[1:]:
        _check_same(first_path, first, path, scaling)
    return first


def _check_same(first_path: Path, first: RopeScaling, path: Path, scaling: RopeScaling) -> None:
    check_agreement(first, scaling, str(first_path), str(path))
    if _is_complete(first_path) and _is_complete(path) and _plain(first) != _plain(scaling):
        raise InputFileError(f"{first_path} and {path} carry different records; write the folder again from one record")


def _is_complete(path: Path) -> bool:
    """Whether the file holds our own record, not only what a runtime reads."""
    if path.name == CONFIG_FILE:
        return own_record(read_json(path)) is not None
    return path.suffix != ".gguf" or read_gguf(path).get("longrope_export.scaling") is not None


def _plain(scaling: RopeScaling) -> str:
    return json.dumps({**scaling.to_dict(), "provenance": None}, sort_keys=True)
