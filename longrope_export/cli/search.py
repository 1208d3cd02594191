"""`longrope search`: find the factors of a longer window and write them as longrope.json."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import LENGTH, print_json, quiet_libraries, result_alone_on_stdout

if TYPE_CHECKING:
    from longrope_export.search.result import SearchResult
    from longrope_export.search.run import SearchConfig


def _numbers(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r}: write whole numbers with commas, such as 0,4,16", ctx, param) from None


def _names(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(","))


# Every option's default is None: what is not given keeps the default of `SearchConfig`, which is the only place for it.
@click.command(short_help="Search the rescale factors for a longer window.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--to", "target", required=True, type=LENGTH, help="New window: 32k, 16384, or 4x the present one.")
@click.option(
    "--data",
    required=True,
    multiple=True,
    type=click.Path(path_type=Path),
    help="Texts to search on: files or folders; repeatable.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder for longrope.json and the journal; the same folder continues a stopped search.",
)
@click.option(
    "--strategy",
    type=click.Choice(["gradient", "evolution", "critical-dim", "cmaes"]),
    help="Descent on log λ, LongRoPE's Algorithm 1, LongRoPE2's structure, or CMA-ES.  [default: gradient]",
)
@click.option(
    "--objective",
    metavar="NAME=WEIGHT,…",
    help="What is lowered: a mixture of perplexity, last, needle; and short, a penalty. With llamacpp in the list, "
    "llama.cpp measures it on a GGUF.  [default: auto: perplexity=0.97,needle=0.03, but perplexity for evolution and where "
    "no needle fits]",
)
@click.option("--last-share", type=float, help="Share of the tokens that `last` scores.  [default: 0.25]")
@click.option("--budget", help="Time (90s, 45m, 1.5h) or number of evaluations.  [default: from a probe]")
@click.option(
    "--documents", type=int, help="Documents to search on; 0: all there are, up to 64 (populations: 5).  [default: 0]"
)
@click.option("--validation-documents", type=int, help="Documents that only choose.  [default: 2]")
@click.option(
    "--report-documents", type=int, help="Documents that are measured at the end and choose nothing.  [default: 0]"
)
@click.option("--seed", type=int, help="Seed of everything random.  [default: 0]")
@click.option(
    "--for",
    "runtime",
    type=click.Choice(["auto", "hf", "gguf"]),
    help="Search only what this target can hold.  [default: auto, by the model's kind]",
)
@click.option(
    "--attention",
    help="Attention factor to begin with: method, su, yarn or a number."
    "  [default: each closed form's own; su for evolution; 1.0 for gguf]",
)
@click.option(
    "--short",
    type=click.Choice(["search", "original"]),
    help="Factors inside the window: search them, or keep the original ones.  [default: search]",
)
@click.option("--short-share", type=float, help="Share of the budget for the short set.  [default: 0.1]")
@click.option(
    "--short-margin",
    type=float,
    help="The original short set stays unless perplexity falls by more than this share.  [default: 0.002]",
)
@click.option("--short-bound", type=float, help="Largest λ of the short set (evolution, paper).  [default: 2.0]")
@click.option(
    "--sets", callback=_names, metavar="LENGTH,…", help="Lengths in between that get a set each, such as 2x,16k."
)
@click.option("--sets-share", type=float, help="Share of the budget for each of them.  [default: 0.1]")
@click.option("--start-tokens", callback=_numbers, metavar="N,N…", help="Values of n̂ to try; 0 tries none.")
@click.option(
    "--baselines",
    callback=_names,
    metavar="NAME,NAME…",
    help="Closed forms to start from and to beat.  [default: yarn,ntk,pi,critical-dim]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    help="Of the weights.  [default: auto: float32 up to 50 M parameters, else bfloat16]",
)
@click.option("--threads", type=int, help="CPU threads of each worker.  [default: torch's, shared by the workers]")
@click.option(
    "--executor",
    type=click.Choice(["local", "processes", "ray"]),
    help="Where candidates are measured: this process, several here, or a Ray cluster.  [default: local]",
)
@click.option("--workers", type=int, help="processes, ray: how many, each with the model in memory.  [default: 2]")
@click.option(
    "--device-map",
    metavar="NAME|FILE",
    help="Place the model through accelerate: auto, cuda:0, … or a JSON file of {module: device}.  [default: CPU]",
)
@click.option(
    "--max-memory",
    metavar="DEVICE=SIZE,…",
    help="With --device-map auto: what weights may fill, such as 0=20GiB,cpu=60GiB; the rest stays on disk.",
)
@click.option(
    "--init",
    type=click.Path(path_type=Path),
    help="gradient, cmaes: start from this longrope.json, carried from its length to this one.",
)
@click.option(
    "--keep-long",
    is_flag=True,
    default=None,
    help="Keep the long set of --init; search the short one, and --sets, alone.",
)
@click.option(
    "--learn-attention/--no-learn-attention",
    default=None,
    help="gradient, cmaes: search the attention factor too.  [default: yes, no for gguf]",
)
@click.option(
    "--learn-short-attention",
    is_flag=True,
    default=None,
    help="gradient, cmaes: search the short set's attention factor too; not for gguf, which has one for both.",
)
@click.option(
    "--constraint",
    type=click.Choice(["none", "monotone", "paper"]),
    help="gradient, cmaes: keep λ non-decreasing, or also within the paper's bounds.  [default: monotone, cmaes none]",
)
@click.option("--learning-rate", type=float, help="gradient: largest step of log λ.  [default: 0.2]")
@click.option(
    "--attention-rate", type=float, help="gradient: the same for the attention factor, as a share.  [default: 0.25]"
)
@click.option(
    "--full-rate-turns",
    type=float,
    help="gradient: pairs that turn more often than this within the window move slower.  [default: 1.0]",
)
@click.option(
    "--early-length",
    metavar="LENGTH",
    help="gradient: make the early steps on pieces of this length, such as 16k or 2x.  [default: none]",
)
@click.option("--early-share", type=float, help="gradient: share of the steps that are early.  [default: 0.75]")
@click.option("--warm-up", type=float, help="gradient: share of the steps with a rising rate.  [default: 0.1]")
@click.option("--trust-region", type=float, help="gradient: no log λ moves further in a step.  [default: 0.25]")
@click.option("--average", type=float, help="gradient: share of the last steps that is averaged.  [default: 0.3]")
@click.option(
    "--patience", type=int, help="gradient, cmaes: checkpoints without a better one before it stops.  [default: 3]"
)
@click.option("--documents-per-step", type=int, help="gradient: documents a step.  [default: grows with the budget]")
@click.option(
    "--bound",
    type=float,
    help="Largest λ, as a multiple of s (evolution, constraint paper).  [default: 1.25; critical-dim by evolution 2.0]",
)
@click.option("--step", type=float, help="evolution: grid of λ.  [default: 0.01]")
@click.option(
    "--population", type=int, help="evolution: P; cmaes: candidates a generation.  [default: 64; 4 + 3 ln dimensions]"
)
@click.option("--iterations", type=int, help="evolution: T.  [default: 40]")
@click.option("--mutations", type=int, help="evolution: N1.  [default: 16]")
@click.option("--crossovers", type=int, help="evolution: N2.  [default: 16]")
@click.option("--parents", type=int, help="evolution: k.  [default: 32]")
@click.option("--mutation-probability", type=float, help="evolution: p.  [default: 0.3]")
@click.option(
    "--paper-large", is_flag=True, help="evolution: the paper's sizes beyond 512k: P, N1, N2 halved, 3 samples."
)
@click.option("--sigma", type=float, help="cmaes: first deviation of the slowest pair's log λ.  [default: 0.2]")
@click.option("--knots", type=int, help="cmaes: increments of log λ, straight in between.  [default: one a pair]")
@click.option(
    "--race/--no-race",
    default=None,
    help="evolution, cmaes: drop clear losers before all documents are measured.  [default: yes for cmaes]",
)
@click.option(
    "--optimiser",
    type=click.Choice(["gradient", "cmaes", "evolution"]),
    help="critical-dim: what moves λ; evolution is LongRoPE2's own.  [default: gradient]",
)
@click.option(
    "--critical-index",
    "critical_indices",
    callback=_numbers,
    metavar="N,N…",
    help="critical-dim: indices to try.  [default: 4 from ten turns in the window to one; evolution: all of these]",
)
@click.option(
    "--dry-run", is_flag=True, help="Print the plan, its memory and its time; search nothing. Not with llamacpp."
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")  # fmt: skip
def search(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Search RoPE rescale factors that make MODEL (an HF folder or a GGUF file) work at a longer window.

    Leaves OUT/longrope.json, and OUT/journal.jsonl with everything that was measured: after Ctrl-C or a crash, the same
    command continues where it stopped and ends with the same factors, bit for bit. Ctrl-C leaves the best so far.

    \b
    Examples:
      longrope search model.gguf --to 4x --data book.txt --out factors
      longrope search ./Llama-3.2-1B --to 32k --data texts/ --budget 1h --out factors
      longrope search ./model --to 8x --data texts/ --strategy evolution --out factors
      longrope search ./model --to 4x --data texts/ --objective perplexity=0.7,needle=0.3 --out factors
      longrope patch model.gguf --scaling factors/longrope.json --out longer.gguf
    """
    quiet_libraries()
    config = dataclasses.replace(search_config(options), command=shlex.join(["longrope", *sys.argv[1:]]))
    if dry_run:
        _dry_run(config, as_json)
        return
    from longrope_export.converters.gguf.patch import patch_gguf
    from longrope_export.search.progress import SearchProgress
    from longrope_export.search.run import run_search

    try:
        with result_alone_on_stdout(), SearchProgress() as progress:
            result = run_search(config, progress, patch_gguf)
    except KeyboardInterrupt as stopped:
        _say_stopped(config, getattr(stopped, "best", None))
        sys.exit(130)
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo("\n".join(_lines(result, config)))


def _dry_run(config: SearchConfig, as_json: bool) -> None:
    from longrope_export.search.preview import preview_search

    preview = preview_search(config)
    if as_json:
        print_json(preview.to_dict())
    else:
        click.echo("\n".join(preview.lines()))


def _say_stopped(config: SearchConfig, best: SearchResult | None) -> None:
    kept = f"; the best so far is in {config.out}/longrope.json" if best else ""
    command = " ".join(["longrope", *map(shlex.quote, sys.argv[1:])])
    click.echo(f"stopped; what was measured is kept{kept}. To continue:\n  {command}", err=True)


def search_config(options: dict[str, Any]) -> SearchConfig:
    """The configuration that the given options (None: not given) ask for; raises `LongRopeError` for a bad value."""
    from longrope_export.search.config import LARGE_DOCUMENTS
    from longrope_export.search.run import SearchConfig
    from longrope_export.search.strategies.cmaes import CmaOptions
    from longrope_export.search.strategies.evolution import EvolutionOptions
    from longrope_export.search.strategies.gradient import GradientOptions

    given = {name: value for name, value in options.items() if value is not None}
    strategy = given.get("strategy", SearchConfig.strategy)
    method = given.get("optimiser", SearchConfig.optimiser) if strategy == "critical-dim" else strategy
    base = EvolutionOptions()
    if given.pop("paper_large", False):
        if method != "evolution":
            raise click.UsageError("--paper-large belongs to --strategy evolution")
        base, given = base.halved(), {"documents": LARGE_DOCUMENTS, **given}
    records: dict[str, Any] = {"gradient": GradientOptions(), "evolution": base, "cmaes": CmaOptions()}
    fields = {name: {each.name for each in dataclasses.fields(record)} for name, record in records.items()}
    own = {name: given.pop(name) for name in fields[method] if name in given}
    for name, known in fields.items():
        if other := sorted(known & given.keys()):
            raise click.UsageError(f"--{other[0].replace('_', '-')} belongs to --strategy {name}")
    records[method] = dataclasses.replace(records[method], **own)
    config = SearchConfig(**given, **records)
    for name, (wanted, fits) in _FITS.items():
        if given.get(name, False) is not False and not fits(config):
            raise click.UsageError(f"--{name.replace('_indices', '-index').replace('_', '-')} belongs to {wanted}")
    return config


def _has_bounds(config: SearchConfig) -> bool:
    constraint = config.cmaes.constraint if config.method == "cmaes" else config.gradient.constraint
    return config.method == "evolution" or constraint == "paper"


# Options that another one makes meaningless: what each belongs to, and whether a search is of that kind. What is ignored
# is refused; --no-… of an option is what such a search does anyway.
_FITS: Mapping[str, tuple[str, Callable[[SearchConfig], bool]]] = {
    "optimiser": ("--strategy critical-dim", lambda config: config.strategy == "critical-dim"),
    "critical_indices": ("--strategy critical-dim", lambda config: config.strategy == "critical-dim"),
    "early_length": ("--strategy gradient", lambda config: config.method == "gradient"),
    "early_share": ("--early-length", lambda config: config.early_length is not None),
    "race": ("--strategy evolution or cmaes", lambda config: config.method != "gradient"),
    "learn_attention": (
        "--strategy gradient or cmaes without --keep-long",
        lambda config: config.method != "evolution" and not config.keep_long,
    ),
    "learn_short_attention": (
        "--short search with --strategy gradient or cmaes",
        lambda config: config.short == "search" and config.method != "evolution",
    ),
    "init": (
        "--strategy gradient or cmaes, which start from it, or to --keep-long",
        lambda config: config.method != "evolution" or config.keep_long,
    ),
    "step": ("--strategy evolution", lambda config: config.method == "evolution"),
    "bound": ("--strategy evolution or --constraint paper", _has_bounds),
    "short_bound": (
        "--short search with --strategy evolution or --constraint paper",
        lambda config: config.short == "search" and _has_bounds(config),
    ),
    "short_share": (
        "--short search without --keep-long",
        lambda config: config.short == "search" and not config.keep_long,
    ),
    "short_margin": ("--short search", lambda config: config.short == "search"),
    "sets_share": ("--sets without --keep-long", lambda config: bool(config.sets) and not config.keep_long),
    "last_share": ("last in --objective", lambda config: "last" in config.mixture.weights),
    "workers": ("--executor processes or ray", lambda config: config.executor != "local"),
    "dtype": ("torch: llama.cpp takes the weights as the file has them", lambda config: config.engine == "torch"),
}


def _lines(result: SearchResult, config: SearchConfig) -> list[str]:
    scaling = result.scaling
    window, target = scaling.original_max_position_embeddings, scaling.max_position_embeddings
    what = "perplexity" if result.objective == "perplexity" else f"exp of {result.objective}"
    fitted = [f"{what} on documents that were searched on:", *_table(result.search_perplexity)]
    report = [f"perplexity on {config.report_documents} report documents, which chose nothing:"]
    report += _table(result.report_perplexity)
    if not config.report_documents:
        report = ["no report documents were asked for: with --report-documents N there are some that chose nothing"]
    return [
        f"{window:,} → {target:,} tokens: {result.chosen} long factors, {result.short_chosen} short factors",
        *(fitted if result.search_perplexity else []),
        f"{what} on {config.validation_documents} validation documents of {target:,} tokens:",
        *_table(result.validation_perplexity),
        *report,
        f"perplexity at the window of {window:,} tokens:",
        *_table(result.retention),
        f"long factors {min(scaling.long_factor):.3f} to {max(scaling.long_factor):.3f}, "
        f"attention factor {scaling.long_attention_factor:.4f}, start tokens {scaling.long_start_tokens}",
        f"{result.evaluations:.1f} evaluations of {result.documents} documents "
        f"(and {result.validation_evaluations:.1f} to choose)",
        *(f"note: {line}" for line in result.notes),
        f"written: {config.out}/longrope.json",
    ]


def _table(scores: Mapping[str, float]) -> list[str]:
    width = max((len(name) for name in scores), default=0)
    return [f"  {name:<{width}}  {value:.3f}" for name, value in sorted(scores.items(), key=lambda item: item[1])]
