"""Writing entries into a safetensors header; the tensors' bytes are copied as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from longrope_export.converters.copying import copy_range
from longrope_export.errors import OutputError
from longrope_export.files import atomic_output
from longrope_export.formats.safetensors_header import (
    MAX_HEADER_BYTES,
    METADATA_KEY,
    SafetensorsHeader,
    read_safetensors_header,
)

_ALIGNMENT = 8
# The header that a file had before its first change in place.
UNDO_KEY = "longrope_export.undo"


def write_safetensors_metadata(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    entries: Mapping[str, str],
    *,
    overwrite: bool = False,
) -> None:
    """Write `target`: the file `source` with `entries` added to (or replaced in) its `__metadata__`.

    Equal input gives equal bytes: keys are sorted, tensors stand in the order of their data. Raises
    `InputFileError` when `source` is malformed, `OutputError` when `target` cannot be written.
    """
    header = read_safetensors_header(source)
    if Path(target).exists() and Path(target).samefile(source):
        raise OutputError(f"{target} is the source itself; name another output")
    raw = header_bytes(header, entries)
    with header.path.open("rb", buffering=0) as original, atomic_output(target, overwrite=overwrite) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        copy_range(original, file, header.data_start, header.file_size - header.data_start)


def header_bytes(header: SafetensorsHeader, entries: Mapping[str, str]) -> bytes:
    """The header's JSON with `entries` in its `__metadata__`, padded to the format's alignment; raises `OutputError`."""
    # Readers before transformers 4.50 refuse a file whose metadata names no format. A copy has nothing to undo.
    kept = {key: value for key, value in header.metadata.items() if key != UNDO_KEY}
    metadata = {"format": "pt", **kept, **entries}
    values: dict[str, object] = {METADATA_KEY: dict(sorted(metadata.items()))}
    for name, tensor in sorted(header.tensors.items(), key=lambda item: (item[1].start, item[1].end, item[0])):
        values[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    raw = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode()
    padded = raw.ljust(-(-len(raw) // _ALIGNMENT) * _ALIGNMENT)
    if len(padded) > MAX_HEADER_BYTES:
        raise OutputError(
            f"the header of {header.path} would have {len(padded):,} bytes; safetensors allows {MAX_HEADER_BYTES:,}"
        )
    return padded
