"""The original of a file that was patched in place, as a new file: for systems that cannot take room back."""

from __future__ import annotations

import os
from pathlib import Path

from longrope_export.converters.copying import copy_range
from longrope_export.converters.gguf.in_place import original_of
from longrope_export.converters.gguf.rewrite import refuse_same_file
from longrope_export.files import atomic_output, check_output
from longrope_export.formats.gguf_header import read_gguf_header


def write_original(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, overwrite: bool = False, dry_run: bool = False
) -> int:
    """Write `target`: the bytes that the GGUF file `source` had before it was patched in place; their number.

    Raises `InputFileError` when it was not, or was changed by another tool since, and `OutputError`.
    """
    refuse_same_file(Path(source), Path(target))
    header = read_gguf_header(source)
    original = original_of(header)
    if dry_run:
        check_output(Path(target), overwrite=overwrite)
        return original.size
    with header.path.open("rb", buffering=0) as patched, atomic_output(target, overwrite=overwrite) as file:
        file.write(original.header)
        position = 0
        for offset, raw in original.spots:
            copy_range(patched, file, header.data_start + position, offset - position)
            file.write(raw)
            position = offset + len(raw)
    return original.size
