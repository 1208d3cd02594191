"""`longrope patch`: embed factors in an existing GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import print_json, print_shards

if TYPE_CHECKING:
    from longrope_export.scaling import RopeScaling


@click.command(short_help="Embed factors in an existing GGUF file; no weight is touched.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--scaling",
    "record",
    type=click.Path(path_type=Path),
    required=True,
    help="longrope.json, or any file that carries a record.",
)
@click.option("--out", type=click.Path(path_type=Path), help="GGUF file to write.")
@click.option("--in-place", is_flag=True, help="Change MODEL itself, at once at any size (Linux with ext4 or XFS).")
@click.option("--allow-lossy", is_flag=True, help="Write even what llama.cpp cannot apply fully; it is listed.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--dry-run", is_flag=True, help="Check everything, tell what would be done, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def patch(
    model: Path,
    record: Path,
    out: Path | None,
    in_place: bool,
    allow_lossy: bool,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write MODEL, a possibly quantised GGUF file, with the factors of a record embedded.

    With --in-place MODEL may also be a Hugging Face folder: config.json changes, and the headers of its shards take a
    copy of the record in, into room that they have, by inserted blocks, or by one streaming copy, which is said.

    No weight is touched: the header is rewritten and the tensor bytes are copied, or left where they are with
    --in-place. `longrope unpatch` brings back the bytes from before --in-place. Stopped half-way, it is undone by the
    next longrope command on the file.

    \b
    Examples:
      longrope patch model.gguf --scaling longrope.json --out longer.gguf
      longrope patch model.gguf --scaling longrope.json --in-place
      longrope patch MODEL --scaling longrope.json --in-place
      llama-cli -m longer.gguf -c 32768
    """
    if in_place == (out is not None) or (in_place and overwrite):
        raise click.UsageError("give either --out NEW.gguf (with --overwrite if it exists) or --in-place")
    from longrope_export.converters.lossy import gguf_notes
    from longrope_export.formats.records import read_scaling

    scaling = read_scaling(record)
    if out is None and model.is_dir():
        _patch_folder(model, scaling, allow_lossy=allow_lossy, dry_run=dry_run, as_json=as_json)
        return
    if out is None:
        result = _patch_in_place(model, scaling, allow_lossy=allow_lossy, dry_run=dry_run)
    else:
        result = _patch_copy(model, out, scaling, allow_lossy=allow_lossy, overwrite=overwrite, dry_run=dry_run)
    values = {"path": str(out or model), **result, "notes": gguf_notes(scaling), "dry_run": dry_run}
    if as_json:
        print_json(values)
    else:
        _print(values, scaling)


def _patch_copy(
    model: Path, out: Path, scaling: RopeScaling, *, allow_lossy: bool, overwrite: bool, dry_run: bool
) -> dict[str, Any]:
    from longrope_export.converters.gguf.patch import patch_gguf, plan_patch

    if dry_run:
        size, lossy = plan_patch(model, out, scaling, allow_lossy=allow_lossy, overwrite=overwrite)
        return {"bytes": size, "lossy": lossy}
    lossy = patch_gguf(model, out, scaling, allow_lossy=allow_lossy, overwrite=overwrite)
    return {"bytes": out.stat().st_size, "lossy": lossy}


def _patch_in_place(model: Path, scaling: RopeScaling, *, allow_lossy: bool, dry_run: bool) -> dict[str, Any]:
    from longrope_export.converters.gguf.in_place import patch_in_place

    result = patch_in_place(model, scaling, allow_lossy=allow_lossy, dry_run=dry_run)
    return {"bytes": result.size, "inserted": result.shift, "appended": result.growth, "lossy": list(result.lossy)}


def _patch_folder(model: Path, scaling: RopeScaling, *, allow_lossy: bool, dry_run: bool, as_json: bool) -> None:
    from longrope_export.converters.folder_in_place import patch_folder_in_place

    result = patch_folder_in_place(model, scaling, allow_lossy=allow_lossy, dry_run=dry_run)
    if as_json:
        print_json({"path": str(model), "shards": result.shards, "lossy": list(result.lossy), "dry_run": dry_run})
        return
    would = "would become " if dry_run else ""
    window = f"window {scaling.original_max_position_embeddings} → {scaling.max_position_embeddings}"
    click.echo(f"{model}: {would}{window}")
    print_shards(result.shards)
    for line in result.lossy:
        click.echo(f"lost: {line}")


def _print(values: dict[str, Any], scaling: RopeScaling) -> None:
    would = "would become " if values["dry_run"] else ""
    window = f"window {scaling.original_max_position_embeddings} → {scaling.max_position_embeddings}"
    click.echo(f"{values['path']}: {would}{window}, {values['bytes']:,} bytes")
    if "inserted" in values:
        click.echo(f"in place: {values['inserted']:,} bytes inserted at the front, {values['appended']:,} at the end")
    for line in values["lossy"]:
        click.echo(f"lost: {line}")
    for line in values["notes"]:
        click.echo(f"note: {line}")
