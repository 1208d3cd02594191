"""`longrope eval`: what an extension is worth, at several lengths, against what the model was before."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import LENGTH, print_json, quiet_libraries
from longrope_export.cli.progress import progress
from longrope_export.evaluation.protocol import TaskOption
from longrope_export.evaluation.registry import REGISTRY, WITH_ARGUMENT, task_options
from longrope_export.lengths import resolve_length

if TYPE_CHECKING:
    from longrope_export.description import ModelDescription
    from longrope_export.evaluation.results import EvaluationResult
    from longrope_export.evaluation.run import EvaluateOptions

_TASK_NAMES = ", ".join([*REGISTRY, *(f"{name}:NAME" for name in WITH_ARGUMENT)])


def _names(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (value or "").split(",") if part.strip())


def _tasks(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    names = _names(ctx, param, value)
    heads = {name.partition(":")[0] for name in names}
    if heads - {*REGISTRY, *WITH_ARGUMENT}:
        raise click.BadParameter(f"choose from {_TASK_NAMES}", ctx, param)
    return names


def _lengths(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, ...]:
    return tuple(LENGTH.convert(part, param, ctx) for part in _names(ctx, param, value))


def _task_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give the command every task's own options; one that is not given is not passed on."""
    for name, option in reversed(list(task_options())):
        command = click.option(
            f"--{option.name.replace('_', '-')}", option.name, type=_click_type(option), help=_help(option, name)
        )(command)
    return command


def _click_type(option: TaskOption) -> Any:
    if option.type == "length":
        return LENGTH
    return click.Choice(option.type) if isinstance(option.type, tuple) else option.type


def _help(option: TaskOption, task: str) -> str:
    shown = "" if option.default is None else f" [default: {option.default}]"
    return f"({task}) {option.help}{shown}"


@click.command(name="eval", short_help="Measure what an extension is worth: perplexity, retention, retrieval.")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@click.option(
    "--tasks",
    callback=_tasks,
    help=f"What to measure, of {_TASK_NAMES} [default: perplexity, passkey, and with several rows retention].",
)
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
@click.option(
    "--scaling", multiple=True, type=click.Path(path_type=Path), help="A longrope.json, or any file with a record; repeatable."
)  # fmt: skip
@click.option(
    "--methods",
    default="unchanged",
    show_default=True,
    callback=_names,
    help="Rows before those of --scaling: unchanged, plain, pi, ntk, dynamic-ntk, yarn …; empty for none.",
)
@click.option("--to", "target", type=LENGTH, help="Window that --methods are set for [default: the longest length].")
@click.option(
    "--switch",
    type=click.Choice(["sequence", "context", "short", "long"]),
    default="sequence",
    show_default=True,
    help="Which set of a record applies; sequence: by each row's length.",
)
@click.option("--context", type=click.IntRange(min=1), help="With --switch context: the context that decides.")
@click.option(
    "--runtime",
    type=click.Choice(["transformers", "llamacpp"]),
    default="transformers",
    show_default=True,
    help="What runs the model: the reference loader, or llama.cpp itself (GGUF).",
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Weights [default: the file's].")
@click.option(
    "--prefill-chunk",
    type=click.IntRange(min=0),
    help="Tokens of a forward pass with a KV cache; 0: whole rows [default: 1,024 above 16,384 tokens].",
)
@click.option(
    "--position-offset", type=LENGTH, default="0", help="First position id, for positions that no memory holds a text for."
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of keys and needles.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: torch's].")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for result.json, measures.csv and the journal that an interrupted run goes on from.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="Print every number as CSV.")
@_task_options
def evaluate(as_json: bool, as_csv: bool, **options: Any) -> None:
    """Measure each MODEL (an HF folder or a GGUF file) with its own factors and with others, on texts and on retrieval.

    Rows are compared with the first one document by document; texts, records and lengths are checked before a model is
    loaded. With --out an interrupted run goes on where it was: give the same command again.

    \b
    Examples:
      longrope eval model.gguf --data book.txt --lengths 8k,16k --dtype bfloat16
      longrope eval ./Llama-3.2-1B --scaling longrope.json --data books/ --lengths 1x,4x
      longrope eval MODEL --methods unchanged,pi,ntk,yarn --to 8x --data book.txt --lengths 1x,2x,4x,8x
      longrope eval MODEL --scaling a.json --scaling b.json --tasks perplexity,longppl --out results
      longrope eval model.gguf longer.gguf --runtime llamacpp --lengths 8k,32k
    """
    from longrope_export.description import describe

    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    quiet_libraries()
    from longrope_export.evaluation.run import run_evaluation

    models = [describe(path) for path in options["models"]]
    resolved = _resolve(options, models[0])
    try:
        result = run_evaluation(resolved, models, progress, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        kept = f"what was measured is kept. To continue:\n  {resolved.command}" if resolved.out else "nothing was kept"
        click.echo(f"stopped; {kept}", err=True)
        sys.exit(130)
    if as_json:
        print_json(result.to_dict())
    elif as_csv:
        click.echo(result.to_csv(), nl=False)
    else:
        _print(result)


def _resolve(options: dict[str, Any], model: ModelDescription) -> EvaluateOptions:
    from longrope_export.evaluation.run import EvaluateOptions

    if (options["context"] is None) != (options["switch"] != "context"):
        raise click.UsageError("--context and --switch context belong together")
    if not options["methods"] and not options["scaling"]:
        raise click.UsageError("there is nothing to measure: give --methods or --scaling")
    window = model.original_window
    target, offset = options.pop("target"), options.pop("position_offset")
    lengths = sorted({resolve_length(text, window) for text in options.pop("lengths")})
    return EvaluateOptions(
        task_options=_chosen(options, window),
        lengths=tuple(lengths),
        scalings=tuple(options.pop("scaling")),
        target=resolve_length(target, window) if target else None,
        position_offset=resolve_length(offset, window),
        command=shlex.join(["longrope", *sys.argv[1:]]),
        **options,
    )


def _chosen(options: dict[str, Any], window: int) -> dict[str, Any]:
    """The tasks' options that were given, taken out of `options`; lengths in tokens."""
    of_length = {option.name for _, option in task_options() if option.type == "length"}
    given = {name: options.pop(name) for name in dict.fromkeys(option.name for _, option in task_options())}
    return {
        name: resolve_length(value, window) if name in of_length else value
        for name, value in given.items()
        if value is not None
    }


def _print(result: EvaluationResult) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    for table in result.tables():
        console.print(table)
    console.print(f"measured in {result.values['seconds']:.1f} s")
