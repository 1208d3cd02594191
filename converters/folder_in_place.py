"""A model folder that gets its factors where it is: shards' headers first, config.json last, and all of it undone.

A folder is a valid model at every moment: nothing but config.json decides what runtimes apply, and it changes in one
rename. `.longrope-undo.json` holds the small files as they were, each shard its own former header.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from longrope_export.converters.folder_undo import (
    SMALL_FILES,
    UNDO_FILE,
    bring_back,
    check_unedited,
    read_undo,
    take_undo,
    write_undo,
)
from longrope_export.converters.hf_folder import FolderPlan, model_shards, plan_folder
from longrope_export.converters.safetensors import UNDO_KEY
from longrope_export.converters.safetensors_in_place import How, add_safetensors_metadata, restore_safetensors
from longrope_export.errors import InputFileError, OutputError
from longrope_export.files import MANIFEST, output_errors, sync_folder, write_manifest, write_text
from longrope_export.formats.records import SAFETENSORS_KEY
from longrope_export.formats.safetensors_header import read_safetensors_header
from longrope_export.scaling import RopeScaling


@dataclass(frozen=True)
class FolderResult:
    """How each shard took its entries in (or gave them back), by name, and what the folder will not apply."""

    shards: dict[str, How]
    lossy: tuple[str, ...] = ()


def patch_folder_in_place(
    folder: str | os.PathLike[str], scaling: RopeScaling, *, allow_lossy: bool = False, dry_run: bool = False
) -> FolderResult:
    """Embed `scaling` in the model folder itself; `dry_run` checks everything and changes nothing.

    A folder that was patched in place before is patched as if it had not been. Raises as `write_hf_folder` and
    `add_safetensors_metadata`; what can be refused is refused before anything changes.
    """
    place = Path(folder)
    saved = read_undo(place)
    if saved is not None:
        check_unedited(place, saved)

    def planned() -> FolderPlan:
        config = None if saved is None else saved.config
        return plan_folder(place, scaling, name=str(place), allow_lossy=allow_lossy, config=config)

    plan = planned()
    _refuse_links(place)
    entries = {SAFETENSORS_KEY: plan.scaling.to_json()}
    how = {shard.name: add_safetensors_metadata(shard, entries, dry_run=True) for shard in plan.shards}
    if not dry_run:
        if saved is not None:
            bring_back(place, saved)
            plan = planned()
        write_undo(place, saved or take_undo(place), plan.texts)
        for shard in plan.shards:
            add_safetensors_metadata(shard, entries)
        for name, text in plan.texts.items():
            write_text(place / name, text, overwrite=True)
        if (place / MANIFEST).exists():
            write_manifest(place)
    return FolderResult(how, tuple(plan.losses))


def unpatch_folder_in_place(folder: str | os.PathLike[str], *, dry_run: bool = False) -> FolderResult:
    """Bring back every byte that the folder had before `patch_folder_in_place`.

    Raises `InputFileError` when it was not patched, or something was changed by another tool since, and `OutputError`.
    """
    place = Path(folder)
    saved = read_undo(place)
    if saved is None:
        raise InputFileError(f"{place} was not patched in place; it has no {UNDO_FILE}")
    check_unedited(place, saved)
    shards = [shard for shard in model_shards(place) if UNDO_KEY in read_safetensors_header(shard).metadata]
    how = {shard.name: restore_safetensors(shard, dry_run=True) for shard in shards}
    if not dry_run:
        bring_back(place, saved)
        for shard in shards:
            restore_safetensors(shard)
        with output_errors(place):
            (place / UNDO_FILE).unlink()
            sync_folder(place)
    return FolderResult(how)


def _refuse_links(folder: Path) -> None:
    """The small files of a download cache are links as well; a rename would part them from it."""
    for path in (folder / name for name in SMALL_FILES):
        if path.is_symlink():
            raise OutputError(f"{path} is a link to {path.resolve()}; write a copy instead, with `longrope export`")
