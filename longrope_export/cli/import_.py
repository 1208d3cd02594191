"""`longrope import`: factors from other tools' files as longrope.json."""

from __future__ import annotations

from pathlib import Path

import click

from longrope_export.cli.common import LENGTH, print_json
from longrope_export.lengths import resolve_length

_LISTS = (".csv", ".txt", ".tsv")


@click.command(short_help="Make longrope.json from another tool's factors, or from a model's config.")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="File to write, such as longrope.json.")
@click.option(
    "--model", type=click.Path(path_type=Path), help="Model that a CSV file's factors are for: base, pairs, window."
)
@click.option("--short", type=click.Path(path_type=Path), help="CSV file with the short factors (default: all 1).")
@click.option("--to", "target", type=LENGTH, help="Window that the factors reach; a CSV file does not say it.")
@click.option("--original", type=LENGTH, help="Window before the extension, where the source does not say it rightly.")
@click.option("--attention-factor", type=float, help="For a CSV file (default: √(1 + ln s/ln L)).")
@click.option("--start-tokens", type=click.IntRange(min=0), default=0, show_default=True,
              help="For a CSV file: first positions that keep the original frequencies.")  # fmt: skip
@click.option("--overwrite", is_flag=True, help="Replace --out if it exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def import_command(
    source: Path, out: Path, model: Path | None, short: Path | None, target: str | None, original: str | None,
    attention_factor: float | None, start_tokens: int, overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write the record of SOURCE's factors: a CSV file of microsoft/LongRoPE, a config.json, a folder, or a GGUF file.

    A config may say longrope (or su, with short_mscale and long_mscale), YaRN, linear, Llama-3 or dynamic NTK; what is
    not longrope becomes the factors that it is.

    \b
    Examples:
      longrope import result_final.csv --model ./Llama-2-7b --to 128k --out longrope.json
      longrope import ./Phi-3-mini-128k-instruct --out longrope.json
      longrope import ./Qwen2.5-7B/config.json --out longrope.json
    """
    from longrope_export.cli.read import print_record
    from longrope_export.converters.imports.run import import_csv, import_model
    from longrope_export.files import write_text

    is_list = source.suffix.lower() in _LISTS
    _check_options(is_list, model, short, target, attention_factor, start_tokens)
    before = None if original is None else _tokens(original, "--original")
    if is_list:
        assert model is not None
        assert target is not None
        window = resolve_length(target, before or _window(model))
        scaling = import_csv(
            source, model=model, window=window, original=before, short=short,
            attention_factor=attention_factor, start_tokens=start_tokens,
        )  # fmt: skip
    else:
        scaling = import_model(source, original=before, window=None if target is None else _tokens(target, "--to"))
    write_text(out, scaling.to_json(), overwrite=overwrite)
    if as_json:
        print_json(scaling.to_dict())
    else:
        print_record(scaling)


def _check_options(
    is_list: bool, model: Path | None, short: Path | None, target: str | None, attention: float | None, start: int
) -> None:
    if is_list and (model is None or target is None):
        raise click.UsageError("a CSV file says neither its model nor its window: give --model and --to")
    if not is_list and (model is not None or short is not None or attention is not None or start):
        raise click.UsageError("--model, --short, --attention-factor and --start-tokens are for a CSV file")


def _tokens(text: str, option: str) -> int:
    if text.endswith("x"):
        raise click.UsageError(f"{option} must be a number of tokens here, such as 32768 or 32k")
    return resolve_length(text, 0)


def _window(model: Path) -> int:
    from longrope_export.description import describe

    return describe(model).original_window
