"""`longrope unpatch`: the file's bytes from before `longrope patch --in-place`."""

from __future__ import annotations

from pathlib import Path

import click

from longrope_export.cli.common import print_json, print_shards


@click.command(short_help="Undo `patch --in-place`: every byte as it was.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Write the original here and leave MODEL as it is.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--dry-run", is_flag=True, help="Check everything, tell what would be done, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def unpatch(model: Path, out: Path | None, overwrite: bool, dry_run: bool, as_json: bool) -> None:
    """Bring back the bytes that MODEL had before `longrope patch --in-place`.

    The patched file itself carries what that needs, also when it was moved or patched several times. With --out, the
    original is written as a new file, which works on every system. A Hugging Face folder is brought back too.

    \b
    Examples:
      longrope unpatch model.gguf
      longrope unpatch longer.gguf --out model.gguf
    """
    if overwrite and out is None:
        raise click.UsageError("--overwrite goes with --out")
    if model.is_dir():
        _unpatch_folder(model, out, dry_run=dry_run, as_json=as_json)
        return
    size = _size(model, out, overwrite=overwrite, dry_run=dry_run)
    if as_json:
        print_json({"path": str(out or model), "bytes": size, "dry_run": dry_run})
        return
    click.echo(f"{out or model}: {'would be ' if dry_run else ''}as before the patch, {size:,} bytes")


def _unpatch_folder(model: Path, out: Path | None, *, dry_run: bool, as_json: bool) -> None:
    if out is not None:
        raise click.UsageError("--out goes with a GGUF file; a folder is brought back where it is")
    from longrope_export.converters.folder_in_place import unpatch_folder_in_place

    result = unpatch_folder_in_place(model, dry_run=dry_run)
    if as_json:
        print_json({"path": str(model), "shards": result.shards, "dry_run": dry_run})
        return
    click.echo(f"{model}: {'would be ' if dry_run else ''}as before the patch")
    print_shards(result.shards)


def _size(model: Path, out: Path | None, *, overwrite: bool, dry_run: bool) -> int:
    from longrope_export.converters.gguf.in_place import unpatch_in_place
    from longrope_export.converters.gguf.in_place_copy import write_original

    if out is None:
        return unpatch_in_place(model, dry_run=dry_run).size
    return write_original(model, out, overwrite=overwrite, dry_run=dry_run)
