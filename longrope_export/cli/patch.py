"""`longrope patch`: embed factors in an existing GGUF file."""

from __future__ import annotations

from pathlib import Path

import click

from longrope_export.cli.common import print_json


@click.command(short_help="Embed factors in an existing GGUF file; no weight is touched.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--scaling",
    "record",
    type=click.Path(path_type=Path),
    required=True,
    help="longrope.json, or any file that carries a record.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="GGUF file to write.")
@click.option("--allow-lossy", is_flag=True, help="Write even what llama.cpp cannot apply fully; it is listed.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def patch(model: Path, record: Path, out: Path, allow_lossy: bool, overwrite: bool, as_json: bool) -> None:
    """Write MODEL, a possibly quantised GGUF file, with the factors of a record embedded.

    No weight is touched: the header is rewritten and the tensor bytes are copied.

    \b
    Example:
      longrope patch model.gguf --scaling longrope.json --out longer.gguf
      llama-cli -m longer.gguf -c 32768
    """
    from longrope_export.converters.gguf.patch import patch_gguf
    from longrope_export.converters.lossy import gguf_notes
    from longrope_export.formats.records import read_scaling

    scaling = read_scaling(record)
    lossy = patch_gguf(model, out, scaling, allow_lossy=allow_lossy, overwrite=overwrite)
    notes = gguf_notes(scaling)
    if as_json:
        print_json({"path": str(out), "bytes": out.stat().st_size, "lossy": lossy, "notes": notes})
        return
    click.echo(
        f"{out}: window {scaling.original_max_position_embeddings} → {scaling.max_position_embeddings}, "
        f"{out.stat().st_size:,} bytes"
    )
    for line in lossy:
        click.echo(f"lost: {line}")
    for line in notes:
        click.echo(f"note: {line}")
