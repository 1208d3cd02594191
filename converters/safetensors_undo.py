"""The entry `longrope_export.undo` of a shard that was changed in place: the header that it had before, compressed."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping

from longrope_export.converters.safetensors import UNDO_KEY
from longrope_export.errors import InputFileError
from longrope_export.formats.safetensors_header import (
    SafetensorsHeader,
    most_header_bytes,
    parse_safetensors_header,
)

_LEVEL = 9


def undo_entry(header: SafetensorsHeader, raw: bytes) -> dict[str, str]:
    """The entry that brings back `raw`, the JSON (and the spaces behind it) of `header`; an earlier one is kept."""
    if UNDO_KEY in header.metadata:
        original_header(header)
        return {UNDO_KEY: header.metadata[UNDO_KEY]}
    return {UNDO_KEY: base64.b64encode(zlib.compress(raw, _LEVEL)).decode()}


def original_header(header: SafetensorsHeader) -> bytes:
    """The header's bytes from before the file was changed in place, without the eight of its length.

    Raises `InputFileError` when the file was not changed in place, or was by another tool since.
    """
    text = header.metadata.get(UNDO_KEY)
    if text is None:
        raise InputFileError(f"{header.path} was not changed in place; it carries nothing to undo")
    try:
        inflate = zlib.decompressobj()
        raw = inflate.decompress(base64.b64decode(text, validate=True), most_header_bytes(header.file_size))
        complete = inflate.eof and not inflate.unused_data
    except (ValueError, zlib.error):
        complete = False
    if not complete or not _is_before(header, raw):
        raise InputFileError(
            f"{header.path}: its entry {UNDO_KEY} is damaged or not about this file; another tool has changed the "
            "file since it was changed in place"
        )
    return raw


def _is_before(header: SafetensorsHeader, raw: bytes) -> bool:
    """Whether `raw` names the same tensors, and no metadata that the present header has lost or changed."""
    size = header.file_size - header.data_start + 8 + len(raw)
    try:
        before = parse_safetensors_header(header.path, raw, size)
    except InputFileError:
        return False
    return dict(before.tensors) == dict(header.tensors) and _contained(before.metadata, header.metadata)


def _contained(before: Mapping[str, str], after: Mapping[str, str]) -> bool:
    ours = {key: value for key, value in before.items() if not key.startswith("longrope_export.")}
    return all(after.get(key) == value for key, value in ours.items())
