"""Embedding factors in an existing GGUF file: a new header in front of the same tensor bytes."""

from __future__ import annotations

import os
from pathlib import Path

from longrope_export.converters.gguf.checks import check_patchable
from longrope_export.converters.gguf.rewrite import refuse_same_file, rewrite_gguf, rewritten_size
from longrope_export.converters.gguf.scaling_keys import scaling_changes
from longrope_export.files import check_output
from longrope_export.formats.gguf_shards import read_gguf
from longrope_export.scaling import RopeScaling


def patch_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    allow_lossy: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write `target`: the GGUF file `source` with `scaling` embedded and every weight as it was.

    Returns what the file cannot express, which is refused unless `allow_lossy`. Patching is idempotent, and
    the result does not depend on a scaling that `source` carried before. Of a split model all shards are
    written, and `target` must have a first shard's name. Raises `InputFileError` for a damaged file,
    `UnsupportedModelError` when llama.cpp would not apply the factors, `ScalingError` when the record belongs
    to another model, `LossyTargetError`, and `OutputError`.
    """
    refuse_same_file(Path(source), Path(target))
    header = read_gguf(source)
    lossy = check_patchable(header, scaling, allow_lossy=allow_lossy)
    rewrite_gguf(header, target, scaling_changes(header, scaling), overwrite=overwrite)
    return lossy


def plan_patch(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    allow_lossy: bool = False,
    overwrite: bool = False,
) -> tuple[int, list[str]]:
    """What `patch_gguf` would write, in bytes, and what it would return; raises what it raises, writes nothing."""
    refuse_same_file(Path(source), Path(target))
    header = read_gguf(source)
    lossy = check_patchable(header, scaling, allow_lossy=allow_lossy)
    check_output(Path(target), overwrite=overwrite)
    return rewritten_size(header, scaling_changes(header, scaling), Path(target).absolute().parent), lossy
