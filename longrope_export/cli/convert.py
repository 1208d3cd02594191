"""`longrope convert`: one GGUF file from a model folder or another GGUF file, with the factors of a record."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import GGUF_DTYPE, LENGTH, print_json, quiet_libraries
from longrope_export.errors import LongRopeError, ScalingError
from longrope_export.lengths import resolve_length

if TYPE_CHECKING:
    from longrope_export.scaling import RopeScaling


@click.command(short_help="Write one GGUF file with factors: of any family, with llama.cpp's own script.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("options", nargs=-1)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="GGUF file to write.")
@click.option(
    "--scaling", "record", type=click.Path(path_type=Path),
    help="longrope.json, or any file that carries a record (default: the one that MODEL carries).",
)  # fmt: skip
@click.option(
    "--with", "script", type=click.Path(path_type=Path),
    help="Convert with this convert_hf_to_gguf.py of llama.cpp, whatever the family; OPTIONS behind -- go to it.",
)  # fmt: skip
@click.option("--dtype", type=GGUF_DTYPE, help="Without --with (default f16).")
@click.option(
    "--as", "architecture", type=click.Choice(["llama", "phi3", "granite", "step35"]),
    help="GGUF architecture to write the model as (default: its own, or llama where that ignores factors).",
)  # fmt: skip
@click.option(
    "--static", is_flag=True,
    help="The long factors at every length, as rope_freqs: for llama.cpp before 2026-03-29.",
)  # fmt: skip
@click.option(
    "--approximate", type=click.Choice(["auto", "yarn", "linear", "base"]),
    help="No factors, but the keys of a method that come nearest, with --allow-lossy: for other architectures.",
)  # fmt: skip
@click.option(
    "--measure", type=click.Path(path_type=Path), multiple=True,
    help="Texts: print what --approximate costs in perplexity, before anything is written; repeatable.",
)  # fmt: skip
@click.option("--measure-at", type=LENGTH, help="Length to measure at besides the window [default: the new window].")
@click.option("--allow-lossy", is_flag=True, help="Write even what llama.cpp cannot apply fully; it is listed.")
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def convert(
    model: Path,
    options: tuple[str, ...],
    out: Path,
    record: Path | None,
    script: Path | None,
    dtype: str | None,
    architecture: str | None,
    static: bool,
    approximate: str | None,
    measure: tuple[Path, ...],
    measure_at: str | None,
    allow_lossy: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write MODEL (an HF folder, or a GGUF file) as one GGUF file with the factors of a record.

    Folders of llama, mistral, qwen2, phi3 and granite are converted here, all others by llama.cpp's own script
    (--with), which runs in a process of its own and must be there already. A GGUF file keeps its quantised weights.

    \b
    Examples:
      longrope convert MODEL --scaling longrope.json --out longer.gguf --dtype q8_0
      longrope convert MODEL --out longer.gguf --with llama.cpp/convert_hf_to_gguf.py -- --outtype bf16
      longrope convert qwen2-q4.gguf --scaling longrope.json --out longer.gguf --as granite
      longrope convert gemma.gguf --scaling longrope.json --out longer.gguf --approximate auto --measure book.txt
    """
    _check_usage(model, options, script, dtype, other_form=bool(static or architecture), approximate=approximate)
    quiet_libraries()
    if approximate is None and (measure or measure_at):
        raise click.UsageError("--measure goes with --approximate")
    if measure_at and not measure:
        raise click.UsageError("--measure-at goes with --measure")
    scaling = _record(model, record)
    measured = _measured(model, scaling, approximate, measure, measure_at) if approximate and measure else []
    how: dict[str, Any] = {
        "architecture": architecture,
        "static": static,
        "allow_lossy": allow_lossy,
        "overwrite": overwrite,
    }
    if script is not None:
        from longrope_export.converters.with_script import convert_with

        echo = _echo if sys.stderr.isatty() else None
        path, done = convert_with(
            script, model, out, scaling, options=options, approximate=approximate, echo=echo, **how
        )
        lossy, notes = done.losses, done.notes
    elif model.is_file():
        from longrope_export.converters.gguf.embed import embed

        path, done = embed(model, out, scaling, approximate=approximate, **how)
        lossy, notes = done.losses, done.notes
    else:
        path = out
        lossy, notes = _convert_folder(model, out, scaling, dtype or "f16", **how)
    _print(path, scaling, lossy, notes, measured, as_json)


def _check_usage(
    model: Path, options: tuple[str, ...], script: Path | None, dtype: str | None, *, other_form: bool,
    approximate: str | None,
) -> None:  # fmt: skip
    if script is None and options:
        raise click.UsageError(f"{options[0]}: options behind -- go to the script of --with")
    if dtype is not None and (script is not None or model.is_file()):
        raise click.UsageError("--dtype does not go with --with (-- --outtype does) or with a GGUF file")
    if script is not None and model.is_file():
        raise click.UsageError("--with converts a model folder, not a file")
    if approximate is not None and (other_form or (script is None and not model.is_file())):
        raise click.UsageError("--approximate goes with --with or with a GGUF file, not with --as or --static")


def _convert_folder(
    model: Path, out: Path, scaling: RopeScaling, dtype: str, **how: Any
) -> tuple[list[str], list[str]]:
    from longrope_export.converters.gguf.conversion import plan_conversion
    from longrope_export.converters.gguf.convert import write_conversion
    from longrope_export.converters.gguf.disguise import file_notes

    overwrite = how.pop("overwrite")
    plan = plan_conversion(model, scaling, dtype=dtype, **how)
    write_conversion(plan, out, overwrite=overwrite)
    own = plan.model.family.gguf_architectures[0]
    return plan.losses, file_notes(scaling, own, plan.target.architecture, static=how["static"])


def _measured(
    model: Path, scaling: RopeScaling, method: str, texts: tuple[Path, ...], length: str | None
) -> list[dict[str, Any]]:
    """The costs, which are said at once: they decide whether --allow-lossy is worth it."""
    from longrope_export.converters.approximation_cost import approximation_cost

    at = None if length is None else resolve_length(length, scaling.original_max_position_embeddings)
    costs = approximation_cost(model, scaling, method, texts, length=at)
    for cost in costs:
        click.echo(f"measured: {cost}", err=True)
    return [asdict(cost) for cost in costs]


def _record(model: Path, record: Path | None) -> RopeScaling:
    from longrope_export.formats.records import read_scaling

    if record is not None:
        return read_scaling(record)
    try:
        return read_scaling(model)
    except LongRopeError as error:
        raise ScalingError(f"no record to embed: {error}; or name one with --scaling") from None


def _echo(block: bytes) -> None:
    sys.stderr.buffer.write(block)
    sys.stderr.flush()


def _print(
    path: Path, scaling: RopeScaling, lossy: list[str], notes: list[str], measured: list[dict[str, Any]], as_json: bool
) -> None:
    size = path.stat().st_size
    if as_json:
        values: dict[str, Any] = {"path": str(path), "bytes": size, "lossy": lossy, "notes": notes}
        print_json({**values, "measured": measured} if measured else values)
        return
    window = f"window {scaling.original_max_position_embeddings} → {scaling.max_position_embeddings}"
    click.echo(f"{path}: {window}, {size:,} bytes")
    for line in lossy:
        click.echo(f"lost: {line}")
    for line in notes:
        click.echo(f"note: {line}")
