"""`longrope eval`: perplexity and passkey retrieval at several lengths."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import LENGTH, print_json, quiet_libraries
from longrope_export.cli.progress import progress
from longrope_export.lengths import resolve_length

if TYPE_CHECKING:
    from longrope_export.description import ModelDescription
    from longrope_export.evaluation.run import EvaluateOptions, EvaluationResult


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def _tasks(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, ...]:
    from longrope_export.evaluation.run import TASKS

    names = _names(ctx, param, value)
    if not names or set(names) - set(TASKS):
        raise click.BadParameter(f"choose from {', '.join(TASKS)}", ctx, param)
    return names


def _lengths(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(LENGTH.convert(part, param, ctx) for part in _names(ctx, param, value))


@click.command(name="eval", short_help="Measure perplexity and passkey retrieval at several lengths.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--tasks", default="perplexity,passkey", show_default=True, callback=_tasks, help="What to measure.")
@click.option(
    "--data",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Texts: UTF-8 files or folders; repeatable [default: Python's standard library].",
)
@click.option(
    "--documents",
    type=click.IntRange(min=1),
    help="Rows to measure; long texts give several [default: one per text, at most 5].",
)
@click.option(
    "--lengths",
    callback=_lengths,
    help="Lengths such as 256,2k,4x [default: the window, and the longer one].",
)
@click.option("--scaling", type=click.Path(path_type=Path), help="A longrope.json, or any file with a record.")
@click.option(
    "--switch",
    type=click.Choice(["sequence", "context", "short", "long"]),
    help="Which set of factors applies [default: sequence, by each row's length].",
)
@click.option("--context", type=click.IntRange(min=1), help="With --switch context: the context that decides.")
@click.option("--methods", callback=_names, help="Compare on one loaded model: unchanged,pi,ntk,yarn,longrope.json …")
@click.option("--to", "target", type=LENGTH, help="Window that --methods are set for [default: the longest length].")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Weights [default: the file's].")
@click.option("--trials", type=click.IntRange(min=1), default=10, show_default=True, help="Passkeys per length.")
@click.option(
    "--passkey-mode",
    type=click.Choice(["forced", "generate", "both"]),
    default="both",
    show_default=True,
    help="Score the key in one forward pass, by generating it, or both.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the keys.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's].")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(as_json: bool, **options: Any) -> None:
    """Measure MODEL (an HF folder or a GGUF file) on texts, and whether it finds a passkey, at several lengths.

    Perplexity is that of the text's first tokens after BOS, weighted by tokens; texts and lengths are checked before
    the model is loaded.

    \b
    Examples:
      longrope eval model.gguf --data book.txt --lengths 8k,16k --dtype bfloat16
      longrope eval ./Llama-3.2-1B --scaling longrope.json --data books/ --lengths 1x,4x
      longrope eval MODEL --methods unchanged,pi,ntk,yarn --to 8x --data book.txt --lengths 1x,2x,4x,8x
    """
    from longrope_export.description import describe

    quiet_libraries()
    from longrope_export.evaluation.run import run_evaluation

    description = describe(options["model"])
    resolved = _resolve(options, description)
    result = run_evaluation(resolved, description, progress)
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)


def _resolve(options: dict[str, Any], description: ModelDescription) -> EvaluateOptions:
    from longrope_export.evaluation.run import EvaluateOptions

    window = description.original_window
    if options["methods"] and (options["scaling"] or options["switch"] or options["context"]):
        raise click.UsageError(
            "--methods fixes every row's long set; give it without --scaling, --switch and --context"
        )
    if options["target"] and not options["methods"]:
        raise click.UsageError("--to sets --methods; give --methods too")
    if options["methods"] and not (options["target"] or options["lengths"]):
        raise click.UsageError("--methods needs the window to set them for: give --to or --lengths")
    if (options["context"] is None) != (options["switch"] != "context"):
        raise click.UsageError("--context and --switch context belong together")
    target = options.pop("target")
    longer = resolve_length(target, window) if target else None
    lengths = sorted({resolve_length(text, window) for text in options.pop("lengths")})
    switch = options.pop("switch") or "sequence"
    return EvaluateOptions(**options, switch=switch, target=longer, lengths=tuple(lengths))


def _print(result: EvaluationResult) -> None:
    from rich.console import Console

    from longrope_export.evaluation.tables import render_comparison, render_passkey, render_perplexity

    console = Console(markup=False, highlight=False, emoji=False)
    if result.comparison is not None:
        console.print(render_comparison(result.comparison))
    if result.perplexity is not None:
        for table in render_perplexity(result.perplexity):
            console.print(table)
    if result.passkey:
        console.print(render_passkey(result.passkey))
    console.print(f"measured in {result.seconds:.1f} s")
