"""The demo's recipe against the same tuning with PI, NTK and YaRN factors: each arm a command that can be stopped and given again.

    python benchmarks/recipe_factors.py run searched --seed 0     # the shipped recipe `demo`, whole
    python benchmarks/recipe_factors.py run yarn --seed 0         # its tuning alone, with YaRN's factors
    python benchmarks/recipe_factors.py run s2 --seed 0           # rows of 2,048 tokens with YaRN's factors and S²-Attn
    python benchmarks/recipe_factors.py table                     # docs/recipe-results.md from every result

Report documents chose nothing: not the factors, not the recipe's options.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from longrope_export.demo import demo_model_path
from longrope_export.recipe.plan import Job
from longrope_export.recipe.run import run_recipe
from longrope_export.recipe.schema import Recipe, read_recipe

ROOT = Path(__file__).resolve().parent.parent
RUNS, RESULTS, PAGE = (
    ROOT / "runs" / "recipe",
    ROOT / "benchmarks" / "results" / "recipe",
    ROOT / "docs" / "recipe-results.md",
)
SEARCHED, FORMS, SEEDS = "searched", ("yarn", "ntk", "pi"), (0, 1, 2)
ATTENTION: dict[str, dict[str, Any]] = {
    "full": {"attention": "full"},
    "s2": {"attention": "s2"},
    "scca-fixed": {"attention": "scca", "shifts": "fixed"},
    "scca-flow": {"attention": "scca", "shifts": "flow"},
}
TUNE = "tune-2k"
ATTENTION_TEXT = (
    "YaRN's factors, rows of one document of 2,048 tokens; measured with full attention, whatever was trained with.",
)
Result = dict[str, Any]


def recipe_of(arm: str) -> Recipe:
    """The shipped recipe, or its tuning alone: with a closed form's factors, or YaRN's and another attention."""
    recipe = read_recipe("demo")
    if arm == SEARCHED:
        return recipe
    first, tune = recipe.stages[:2]
    options = {**tune.options, "to": first.options["to"]}
    if arm in ATTENTION:
        options |= {"positions": "full", "cut-longer": False, **ATTENTION[arm]}
    return replace(recipe, stages=(replace(tune, factors="yarn" if arm in ATTENTION else arm, options=options),))


@click.group()
def main() -> None:
    """Run arms, or write the page."""


@main.command()
@click.argument("arm", type=click.Choice([SEARCHED, *FORMS, *ATTENTION]))
@click.option("--seed", type=click.Choice([str(seed) for seed in SEEDS]), default="0")
def run(arm: str, seed: str) -> None:
    """Run one arm, or continue it."""
    out = RUNS / f"{arm}-{seed}"
    job = Job(
        recipe=recipe_of(arm), model=demo_model_path(), out=out, texts={}, seed=int(seed), verify=arm == SEARCHED,
        allow_lossy=True,
    )  # fmt: skip
    begun, clock = out.exists(), time.monotonic()
    report = run_recipe(job, lambda line: click.echo(line, err=True))
    spent = [time.process_time() / 60, (time.monotonic() - clock) / 60]
    # Of a run in one go: processor time, and by the clock on so many threads.
    minutes = None if begun else {"processor": spent[0], "clock": spent[1], "threads": torch.get_num_threads()}
    RESULTS.mkdir(parents=True, exist_ok=True)
    kept = {name: report.get(name) for name in ("seed", "verdict", "lossy")}
    result = {"arm": arm, "minutes": minutes, **kept, "stages": [_without_paths(stage) for stage in report["stages"]]}
    (RESULTS / f"{arm}-{seed}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _without_paths(stage: Result) -> Result:
    return {name: value for name, value in stage.items() if name not in ("command", "documents")}


@main.command()
def table() -> None:
    """Write docs/recipe-results.md."""
    found = {
        arm: [json.loads(file.read_text("utf-8")) for file in sorted(RESULTS.glob(f"{arm}-[0-9].json"))]
        for arm in (SEARCHED, *FORMS, *ATTENTION)
    }
    PAGE.write_text(page(found), encoding="utf-8")


def page(found: dict[str, list[Result]]) -> str:
    """The page's text."""
    searched = found[SEARCHED]
    lines = [
        "# Recipe results",
        "",
        "Written by `python benchmarks/recipe_factors.py table`; every row is a command of that file. The embedded model on",
        "two cores, report documents that chose nothing; means over the seeds, with the lowest and the highest.",
        "",
        "## Tuning with other factors",
        "",
        "The same steps on the same texts at 2,048 tokens; *short set* is perplexity at the window of 256 tokens, against",
        f"{_spread(searched, lambda run: _at(run, 'before', 'unchanged', '256'))} of the untouched model.",
        "",
        *_tuned_rows("factors", found, (SEARCHED, *FORMS)),
    ]
    if any(found[arm] for arm in ATTENTION):
        lines += [
            "",
            "## Other attention while tuning",
            "",
            *ATTENTION_TEXT,
            "",
            *_tuned_rows("attention", found, ATTENTION),
        ]
    if searched:
        lines += ["", "## The second eightfold", "", *_second(searched)]
        lines += ["", *_wins(searched), *_cost(searched)]
    return "\n".join(lines) + "\n"


def _tuned_rows(kind: str, found: dict[str, list[Result]], arms: Iterable[str]) -> list[str]:
    rows = [_tuned_row(arm, found[arm]) for arm in arms if found[arm]]
    head = f"| {kind} | seeds | before, 2,048 | tuned, 2,048 | passkeys | short set | minutes |"
    return [head, "|---|---:|---|---|---|---|---:|", *rows]


def _tuned_row(arm: str, runs: Sequence[Result]) -> str:
    before = (lambda run: _at(run, "search-2k", "search-2k", "2048")) if arm == SEARCHED else (
        lambda run: _at(run, "before", "yarn" if arm in ATTENTION else arm, "2048")
    )  # fmt: skip
    seconds = statistics.mean(_stage(run, TUNE)["seconds"] for run in runs)
    return (
        f"| {arm} | {len(runs)} | {_spread(runs, before)} | {_spread(runs, lambda run: _at(run, TUNE, TUNE, '2048'))} | "
        f"{_spread(runs, lambda run: 100 * _stage(run, TUNE)['passkeys'][TUNE]['2048'], 0)} % | "
        f"{_spread(runs, lambda run: _stage(run, TUNE)['short'][TUNE])} | {seconds / 60:.0f} |"
    )


def _second(runs: Sequence[Result]) -> list[str]:
    last = runs[0]["stages"][-1]
    lengths = [str(length) for length in last["lengths"]]
    lines = [
        "| factors | short set | " + " | ".join(f"{int(n):,}" for n in lengths) + " |",
        "|---" * (len(lengths) + 2) + "|",
    ]
    for name in last["perplexity"]:
        cells = [_spread(runs, lambda run, n=n, name=name: _at(run, last["stage"], name, n)) for n in lengths]  # type: ignore[misc]
        short = _spread(runs, lambda run, name=name: _stage(run, last["stage"])["short"][name])  # type: ignore[misc]
        lines.append(f"| {name} | {short} | " + " | ".join(cells) + " |")
    return lines


def _wins(runs: Sequence[Result]) -> list[str]:
    *forms, own = (stage := runs[0]["stages"][-1])["perplexity"]
    length = str(stage["lengths"][-1])
    lower = {
        form: sum(_at(run, stage["stage"], own, length) < _at(run, stage["stage"], form, length) for run in runs)
        for form in forms
    }
    found = ", ".join(f"than {form} in {count}" for form, count in lower.items())
    return [
        f"At {int(length):,} tokens lower {found} of {len(runs)} seeds (a search that finds nothing better keeps a closed form).",
        "",
    ]


def _cost(runs: Sequence[Result]) -> list[str]:
    whole = [run["minutes"] for run in runs if run.get("minutes")]
    parts = statistics.mean(sum(stage.get("seconds", 0.0) for stage in run["stages"]) / 60 for run in runs)
    lines = [f"The stages took {parts:.0f} minutes without the measurements, on one thread beside other work."]
    if whole:
        fastest = min(whole, key=lambda minutes: float(minutes["clock"]))
        lines = [
            f"The whole recipe, its measurements and files too, took {fastest['clock']:.0f} minutes on {fastest['threads']} "
            f"threads ({fastest['processor']:.0f} minutes of processor time)."
        ]
    if any(run["lossy"] for run in runs):
        lines.append(
            "Its record has two attention factors, which one GGUF cannot hold; `longrope_export.load` applies both."
        )
    return lines


def _stage(run: Result, name: str) -> Result:
    return next(stage for stage in run["stages"] if stage["stage"] == name)


def _at(run: Result, stage: str, factors: str, length: str) -> float:
    return float(_stage(run, stage)["perplexity"][factors][length])


def _spread(runs: Sequence[Result], value: Callable[[Result], float], digits: int = 2) -> str:
    values = [value(run) for run in runs]
    if len(values) < 2 or max(values) - min(values) < 10**-digits / 2:
        return f"{statistics.mean(values):.{digits}f}" if values else "–"
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
