"""`longrope finetune`: tune a model with its factors on texts, and write a folder that every other command reads."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import print_json, quiet_libraries
from longrope_export.cli.progress import progress
from longrope_export.errors import LongRopeError

if TYPE_CHECKING:
    from longrope_export.training.config import FinetuneConfig


def _names(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


_TEXTS = click.Path(path_type=Path)


# Every option's default is None: what is not given keeps the default of `FinetuneConfig`, the only place for it.
@click.command(short_help="Tune a model with its factors, on your texts, in little memory.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--scaling",
    type=click.Path(path_type=Path),
    help="The factors: longrope.json, or any file with a record.  [default: MODEL's own]",
)
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=_TEXTS,
    help="Texts to train on: text files, JSONL, folders, datasets on disk; repeatable.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for the tuned model; the same folder continues a stopped run.",
)
@click.option(
    "--positions",
    type=click.Choice(["full", "pose", "segments", "random", "mixed"]),
    help="How positions reach the new window.  [default: full: rows as long as it]",
)
@click.option(
    "--length",
    metavar="LENGTH",
    help="Tokens of a training row: 16k, 2x, …  [default: the new window for full and mixed, else the old one]",
)
@click.option("--chunks", type=int, help="pose: chunks a row.  [default: 2]")
@click.option(
    "--text-offsets/--no-text-offsets",
    default=None,
    help="pose: take the chunks from different places of a longer text.  [default: no]",
)
@click.option("--alpha", type=float, help="segments: a segment's share of the row.  [default: 0.25]")
@click.option(
    "--long-share",
    type=float,
    help="Share of the tokens in long rows; the others hold packed short documents.  [default: 1, mixed 0.6]",
)
@click.option(
    "--packing",
    type=click.Choice(["best-fit", "first-fit"]),
    help="How short documents fill a row.  [default: best-fit]",
)
@click.option(
    "--cut-longer/--no-cut-longer",
    default=None,
    help="Long documents serve as short ones too, in pieces.  [default: no]",
)
@click.option("--field", help="Where JSONL lines and datasets hold the text.  [default: text]")
@click.option(
    "--bos",
    type=click.Choice(["auto", "always", "never"]),
    help="BOS before each document.  [default: auto, as the tokenizer does]",
)
@click.option(
    "--eos",
    type=click.Choice(["auto", "always", "never"]),
    help="EOS behind each document.  [default: auto, where there is one]",
)
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    help="Keep the tokens here, for other runs on the same texts.  [default: in OUT, until it is done]",
)
@click.option(
    "--attention", type=click.Choice(["full", "s2", "scca"]), help="Attention while training.  [default: full]"
)
@click.option("--group-share", type=float, help="s2, scca: a group's share of the row.  [default: 0.25]")
@click.option("--shifts", type=click.Choice(["fixed", "flow"]), help="scca: how heads are shifted.  [default: fixed]")
@click.option(
    "--train",
    type=click.Choice(["full", "lora", "lora-plus"]),
    help="All weights, LoRA, or LoRA with embeddings and norms.  [default: full]",
)
@click.option("--lora-rank", type=int, help="lora: rank r.  [default: 8]")
@click.option("--lora-alpha", type=float, help="lora: α; updates are scaled by α/r.  [default: 16]")
@click.option("--lora-dropout", type=float, help="lora: dropout.  [default: 0]")
@click.option(
    "--lora-targets",
    callback=_names,
    metavar="NAME,…",
    help="lora: modules that get one; all-linear for every one.  [default: the attention's projections]",
)
@click.option("--steps", type=int, help="Optimizer steps.  [default: 400]")
@click.option("--batch", type=int, help="Rows a step, over all processes.  [default: 32]")
@click.option("--micro-batch", type=int, help="Rows that one process computes at once.  [default: 1]")
@click.option("--learning-rate", type=float, help="Highest learning rate.  [default: 2e-5, lora 2e-4]")
@click.option(
    "--schedule",
    type=click.Choice(["constant", "linear", "cosine"]),
    help="The learning rate after the warm-up.  [default: linear]",
)
@click.option("--warmup", type=int, help="Steps in which the learning rate rises.  [default: 20]")
@click.option("--weight-decay", type=float, help="Of AdamW.  [default: 0]")
@click.option("--clip", type=float, help="Largest norm of the gradient; 0 leaves it.  [default: 1]")
@click.option("--optimizer", help="A name of transformers' Trainer.  [default: adamw_torch, β 0.9 and 0.95]")
@click.option("--seed", type=int, help="Of the order of rows, positions and adapters.  [default: 0]")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="To compute in; trained weights are float32.  [default: auto: bfloat16 on GPUs]",
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=None,
    help="Compute activations twice to keep few.  [default: yes]",
)
@click.option("--save-every", type=int, help="Steps between checkpoints.  [default: 50]")
@click.option(
    "--eval-data", multiple=True, type=_TEXTS, help="Texts for perplexity; repeatable.  [default: held out of --data]"
)
@click.option(
    "--eval-documents", type=int, help="How many documents perplexity is measured on.  [default: 4, if texts allow]"
)
@click.option("--eval-every", type=int, help="Steps between measurements.  [default: 50]")
@click.option("--log-every", type=int, help="Steps between lines of log.jsonl.  [default: 1]")
@click.option("--report-to", callback=_names, metavar="NAME,…", help="Also log to tensorboard, wandb, …")
@click.option("--threads", type=int, help="CPU threads.  [default: torch's]")
@click.option(
    "--dry-run", is_flag=True, help="Print rows, tokens, memory and time from two probe steps; train nothing."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")  # fmt: skip
def finetune(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Tune MODEL (an HF folder or a GGUF file) with its LongRoPE factors, so that it is good at the new window.

    Leaves OUT as a model folder with the factors, longrope.json and log.jsonl. After Ctrl-C, a crash or a kill the same
    command continues from the last checkpoint and ends with the same weights. Several GPUs or machines: put
    `accelerate launch -m longrope_export` or `torchrun -m longrope_export` in place of `longrope`.

    \b
    Examples:
      longrope finetune ./model --scaling longrope.json --data books/ --out tuned
      longrope finetune ./model --scaling longrope.json --data books/ --positions pose --train lora --out tuned
      longrope finetune ./model --scaling longrope.json --data texts/ --positions mixed --steps 1000 --out tuned
      torchrun --nproc-per-node 8 -m longrope_export finetune ./model --scaling longrope.json --data books/ --out tuned
    """
    quiet_libraries()
    config = finetune_config(options)
    if dry_run:
        _dry_run(config, as_json)
        return
    from longrope_export.training.finetune import FinetuneStopped, run

    started = time.monotonic()
    try:
        with progress("fine-tuning") as report:
            result = run(config, report if _is_main() else None, _say)
    except FinetuneStopped as stopped:
        _say(f"{stopped}; a checkpoint is saved. To continue:\n  {_command()}")
        sys.exit(130)
    except KeyboardInterrupt:
        _say(f"stopped; the last checkpoint is kept. To continue:\n  {_command()}")
        sys.exit(130)
    except LongRopeError as error:
        if _is_main() or not _found_by_all(error):
            raise
        sys.exit(1)
    if not _is_main():
        return
    if as_json:
        print_json({"out": str(result.folder), **result.summary})
    else:
        click.echo("\n".join([*_lines(result.summary, time.monotonic() - started), f"written: {result.folder}"]))


def finetune_config(options: Mapping[str, Any]) -> FinetuneConfig:
    """The configuration that the given options (None or empty: not given) ask for; raises `LongRopeError`."""
    from longrope_export.training.config import FinetuneConfig

    return FinetuneConfig(**{name: value for name, value in options.items() if value not in (None, ())})


def _dry_run(config: FinetuneConfig, as_json: bool) -> None:
    from longrope_export.training.preview import preview

    found = preview(config)
    if not _is_main():
        return
    if as_json:
        print_json(found.to_dict())
    else:
        click.echo("\n".join(found.lines()))


def _lines(summary: Mapping[str, Any], seconds: float) -> list[str]:
    before, after = summary["before"], summary["after"]
    width = max((len(name) for name in after), default=0)
    return [
        f"{summary['config']['steps']:,} steps, {summary['tokens']:,} tokens, last loss {summary['loss']:.4f}",
        *(
            f"  {name.replace('_', ' '):<{width}}  {before.get(name, value):.3f} → {value:.3f}"
            for name, value in after.items()
        ),
    ]


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _found_by_all(error: LongRopeError) -> bool:
    """Whether every process fails alike, so that one line is enough: before they are connected, or told by the first."""
    from longrope_export.training.processes import SharedError, is_distributed

    return isinstance(error, SharedError) or not is_distributed()


def _say(line: str) -> None:
    if _is_main():
        click.echo(line, err=True)


def _command() -> str:
    return " ".join(["longrope", *map(shlex.quote, sys.argv[1:])])
