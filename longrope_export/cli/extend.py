"""`longrope extend`: the main job in one command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from longrope_export.cli.common import GGUF_DTYPE, LENGTH, name_values, print_json, quiet_libraries


@click.command(short_help="Give a model a longer window: find factors, embed them, check them.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--to", type=LENGTH, help="New window: 32k, 16384, or 4x the present one.")
@click.option(
    "--recipe", metavar="FILE|NAME", help="Instead: stages of searching and fine-tuning, as a YAML file says."
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="File or folder to write [default: named after the model]."
)
@click.option("--method", help="Closed form instead of a search: yarn, ntk, critical-dim, pi, … (see docs/methods.md).")
@click.option("--option", "method_options", multiple=True, callback=name_values, metavar="NAME=VALUE",
              help="An option of the method, e.g. beta_fast=64; repeatable.")  # fmt: skip
@click.option(
    "--short", type=click.Choice(["same", "original"]), help="Short sequences: same factors, or as they were."
)
@click.option("--attention-factor", type=float, help="Replace the method's own attention factor.")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Texts to search on: files or folders; repeatable. With --recipe: ROLE=PATH (search, train, report).",
)
@click.option("--strategy", help="Search strategy [default: gradient].")
@click.option("--budget", help="Search budget: 45m, 2h, or a number of evaluations [default: from a probe].")
@click.option("--documents", type=int, help="Documents to search on.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the search.")
@click.option("--for", "purpose", type=click.Choice(["hf", "gguf"]), help="Search only what this target can apply.")
@click.option("--hf", is_flag=True, help="From a GGUF: write an HF folder (dequantised) as well.")
@click.option("--gguf/--no-gguf", default=None, help="From an HF folder: write a GGUF too [default: where possible].")
@click.option("--dtype", type=GGUF_DTYPE, default="f16", show_default=True,
              help="Weights of a converted GGUF.")  # fmt: skip
@click.option("--verify/--no-verify", default=None, help="Prove it in llama.cpp [default: after a search].")
@click.option("--allow-lossy", is_flag=True, help="Write even what a target cannot apply fully; it is listed.")
@click.option("--overwrite", is_flag=True, help="Replace the output file if it exists.")
@click.option("--dry-run", is_flag=True, help="Print what would be done and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def extend(**options: Any) -> None:
    """Give MODEL (an HF folder or a GGUF file) a longer window.

    With --method, closed-form factors are embedded in seconds; a GGUF stays the same quantised file, patched. With
    --data, the factors are searched on your texts first.

    \b
    Examples:
      longrope extend model.gguf --to 4x --method yarn
      longrope extend model.gguf --to 32k --data book.txt --budget 1h --out longer/
      longrope extend ./Llama-3.2-1B --to 2x --method ntk --out ./longer
      longrope extend ./model --recipe pose --data search=a/ --data train=b/ --data report=c/ --out ./longer
    """
    if options["recipe"] is not None:
        from longrope_export.cli.recipe import extend_by_recipe

        extend_by_recipe(options)
        return
    from longrope_export.extend import ExtendOptions, run_extend

    if options["data"] or options["hf"] or options["verify"]:
        quiet_libraries()
    if options["to"] is None:
        raise click.UsageError("--to is missing: the new window, such as 32k or 4x (or give --recipe)")
    del options["recipe"]
    as_json, dry_run = options.pop("as_json"), options.pop("dry_run")
    command = " ".join(["longrope", *map(shlex.quote, sys.argv[1:])])
    try:
        result = run_extend(
            ExtendOptions(command=command, **options), report=lambda line: click.echo(line, err=True), dry_run=dry_run
        )
    except KeyboardInterrupt:
        click.echo(f"stopped; what was measured is kept. To continue:\n  {command}", err=True)
        sys.exit(130)
    if as_json:
        print_json(result)
    else:
        click.echo("\n".join(_lines(result)))
    if result.get("verdict") not in (None, "pass"):
        sys.exit(1)


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['output']}: window {result['window']} → {result['target']} ({result['method']})"]
    lines += [f"lost: {line}" for line in result["lossy"]]
    lines += [f"note: {line}" for line in result["notes"]]
    if "verdict" in result:
        lines.append(f"verify: {result['verdict']}")
    return [*lines, *result.get("run", ())]
