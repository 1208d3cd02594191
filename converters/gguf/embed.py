"""Factors into a GGUF file of any architecture: as long and short sets, as one set, or under another architecture."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from longrope_export.converters.gguf.approximate import plan_approximation
from longrope_export.converters.gguf.checks import check_patchable
from longrope_export.converters.gguf.disguise import DISGUISES, combined, disguised, file_notes
from longrope_export.converters.gguf.rewrite import GgufChanges, refuse_same_file, rewrite_gguf
from longrope_export.converters.gguf.scaling_keys import scaling_changes
from longrope_export.formats.gguf_header import GgufHeader
from longrope_export.formats.gguf_shards import read_gguf, shard_count, shard_paths
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES, USED
from longrope_export.scaling import RopeScaling


@dataclass(frozen=True)
class Embedding:
    """One rewrite that embeds a record: what it starts from, what it changes, what is lost, and what to know."""

    header: GgufHeader
    changes: GgufChanges
    losses: list[str]
    notes: list[str]


def embed(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    architecture: str | None = None,
    static: bool = False,
    approximate: str | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
) -> tuple[Path, Embedding]:
    """Write `target`: the GGUF file `source` with `scaling`, as `plan_embedding` says, in one streaming copy.

    Of a split model all shards are written, named after `target`; the first one's path is returned. Raises as
    `plan_embedding`, and `OutputError`.
    """
    refuse_same_file(Path(source), Path(target))
    header = read_gguf(source)
    plan = plan_embedding(
        header, scaling, architecture=architecture, static=static, approximate=approximate, allow_lossy=allow_lossy
    )
    first = first_file(header, Path(target))
    rewrite_gguf(plan.header, first, plan.changes, overwrite=overwrite)
    return first, plan


def plan_embedding(
    header: GgufHeader,
    scaling: RopeScaling,
    *,
    architecture: str | None = None,
    static: bool = False,
    approximate: str | None = None,
    allow_lossy: bool = False,
) -> Embedding:
    """How `scaling` gets into the GGUF file of `header`.

    `architecture` None keeps the file's own where that has a place for factors, and else takes the first of its
    `DISGUISES`. `static`: as one set for every length. `approximate`: as the keys of this method, without factors.
    Raises as `patch_gguf`, `disguised` and `plan_approximation`.
    """
    if approximate is not None:
        changes, losses = plan_approximation(header, scaling, approximate, allow_lossy=allow_lossy)
        return Embedding(header, changes, losses, [])
    own = str(header.get("general.architecture"))
    architecture = architecture or usable_architecture(own, static=static)
    changes = GgufChanges()
    if architecture != own:
        header, changes = disguised(header, architecture)
    losses = check_patchable(header, scaling, allow_lossy=allow_lossy, static=static)
    folded = architecture == "granite" != own
    changes = combined(changes, scaling_changes(header, scaling, static=static, folded=folded))
    return Embedding(header, changes, losses, file_notes(scaling, own, architecture, static=static))


def usable_architecture(own: str, *, static: bool = False) -> str:
    """The architecture itself where llama.cpp applies factors in it, else the first that can stand for it, else itself."""
    row = GGUF_ARCHITECTURES.get(own)
    if row is not None and (row.static == USED if static else row.honours_factors):
        return own
    return DISGUISES.get(own, (own,))[0]


def first_file(header: GgufHeader, target: Path) -> Path:
    """`target`, or the first shard's name after it where the model is split and `target` is not one already."""
    count = shard_count(header)
    if count == 1 or target.name.endswith(f"-of-{count:05}.gguf"):
        return target
    return shard_paths(target.with_name(f"{target.stem}-{1:05}-of-{count:05}.gguf"), count)[0]
