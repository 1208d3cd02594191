"""`longrope export`: an HF folder and a GGUF from one model and one record."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longrope_export.cli.common import GGUF_DTYPE, print_json, quiet_libraries

if TYPE_CHECKING:
    from longrope_export.scaling import RopeScaling


@click.command(short_help="Write an HF folder and a GGUF from one model and one record.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--scaling", "record", type=click.Path(path_type=Path), required=True,
    help="longrope.json, or any file that carries a record.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write; it must not exist.")
@click.option(
    "--dtype", type=GGUF_DTYPE,
    help="Of the GGUF made from a folder (default f16), or of the folder made from a GGUF (default f32).",
)  # fmt: skip
@click.option(
    "--for", "profile", type=click.Choice(["default", "exllamav2", "mlx-phi3", "sglang"]), default="default",
    help="For whom config.json is written; the default is read by transformers 4 and 5, vLLM and SGLang.",
)  # fmt: skip
@click.option("--writer", help="Write with another package's writer instead (docs/writers.md).")
@click.option("--no-gguf", is_flag=True, help="Write the HF folder only.")
@click.option("--no-hf", is_flag=True, help="Write the GGUF only.")
@click.option("--allow-lossy", is_flag=True, help="Write even what a runtime cannot apply fully; it is listed.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def export(
    model: Path,
    record: Path,
    out: Path,
    dtype: str | None,
    profile: str,
    writer: str | None,
    no_gguf: bool,
    no_hf: bool,
    allow_lossy: bool,
    as_json: bool,
) -> None:
    """Write MODEL (an HF folder or a GGUF file) with a record embedded, for transformers and for llama.cpp.

    The folder --out holds transformers' files and <model>.gguf. A GGUF source is patched, not converted: its
    quantised weights stay as they are.

    \b
    Example:
      longrope export MODEL --scaling longrope.json --out longer --dtype q8_0
    """
    if writer is not None and (no_gguf or no_hf or dtype or profile != "default"):
        raise click.UsageError("--dtype, --for, --no-gguf and --no-hf do not go with --writer")
    if profile != "default" and (no_hf or not no_gguf):
        raise click.UsageError("--for is about the HF folder alone; add --no-gguf")
    if no_gguf and no_hf:
        raise click.UsageError("--no-gguf and --no-hf together leave nothing to write")
    from longrope_export.converters.export import export_model
    from longrope_export.converters.lossy import gguf_notes
    from longrope_export.formats.records import read_scaling

    quiet_libraries()
    scaling = read_scaling(record)
    if writer is not None:
        _write_with(writer, model, out, scaling, allow_lossy, as_json)
        return
    result = export_model(
        model, out, scaling, dtype=dtype, gguf=not no_gguf, hf=not no_hf, profile=profile, allow_lossy=allow_lossy
    )
    notes = [] if no_gguf else gguf_notes(scaling)
    notes += [] if no_hf or profile != "default" else _misreaders(out, scaling)
    gguf = str(result.gguf) if result.gguf else None
    if as_json:
        print_json({"folder": str(out), "gguf": gguf, "lossy": result.lossy, "notes": notes})
        return
    click.echo(f"{out}: window {scaling.original_max_position_embeddings} → {scaling.max_position_embeddings}")
    if gguf:
        click.echo(f"{gguf}: {Path(gguf).stat().st_size:,} bytes")
    for line in result.lossy:
        click.echo(f"lost: {line}")
    for line in notes:
        click.echo(f"note: {line}")


def _misreaders(folder: Path, scaling: RopeScaling) -> list[str]:
    from longrope_export.converters.hf_config import language_model
    from longrope_export.converters.hf_profiles import default_misreaders
    from longrope_export.formats.hf_config import read_json

    return default_misreaders(language_model(read_json(folder / "config.json")).family, scaling)


def _write_with(name: str, model: Path, out: Path, scaling: RopeScaling, allow_lossy: bool, as_json: bool) -> None:
    from longrope_export.converters.writers import write_with

    lossy = write_with(name, model, out, scaling, allow_lossy=allow_lossy)
    if as_json:
        print_json({"folder": str(out), "writer": name, "lossy": lossy})
        return
    click.echo(f"{out}: written by {name}")
    for line in lossy:
        click.echo(f"lost: {line}")
