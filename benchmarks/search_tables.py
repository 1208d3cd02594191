"""docs/search-results.md: the tables of everything that `benchmarks/search.py` has a result of."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import bootstrap_interval
from search_arms import PASSKEYS
from search_list import ARMS, YARDSTICK

PAGE = Path(__file__).resolve().parent.parent / "docs" / "search-results.md"
Result = dict[str, Any]

_HEAD = """# Search results

Written by `python benchmarks/search.py table` from `benchmarks/results/search/`; every row is a command of
`benchmarks/search.py` that can be stopped and given again. The demo model (3.1 M parameters, window {window} tokens),
float32, one thread, beside other work, on processors of which one is up to twice as fast as the other: costs compare
exactly, seconds roughly. Documents are pieces of Python's standard library: searches draw theirs from 64 rows of the split
"search", 8 rows of "validation" choose, and 26 documents of "report" are measured once, at the end. Means over seeds, with
the lowest and the highest.

- **cost**: forward passes on documents of L' tokens, a gradient counting three. Algorithm 1 and the released operators
  count their search documents alone; the others count what they spent on the validation documents too.
- **validation**: perplexity on the documents that choose; defaults were chosen by this column and the search documents.
- **report**: perplexity on the report documents. *vs YaRN* and *vs Algorithm 1*: its ratio to theirs, minus 1.
- **gap**: (searched ÷ YaRN on report) ÷ (searched ÷ YaRN on search) − 1, what was fitted to the search documents alone.
- **Δ nats**: mean log-loss below Algorithm 1's, paired by report document over all seeds, with a bootstrap's 95 %
  interval over the documents.
- **passkeys**: right of 200 prompts of L' tokens, with Wilson's 95 % interval over the seeds' prompts together.
"""


def write_tables(results: Path) -> None:
    """Write the page; what was not run is not in it."""
    found, closed = read_results(results)
    text = _HEAD.format(window=256)
    for to in sorted(closed, key=lambda each: -int(each.rstrip("x"))):
        arms = {name: found[name, to] for name in ARMS if (name, to) in found}
        text += f"\n## {to}: {256 * int(to.rstrip('x')):,} tokens\n" + "\n".join(_table(arms, closed[to])) + "\n"
    text += "\n## The arms\n" + "\n".join(f"- **{arm.name}**: {arm.about}" for arm in ARMS.values()) + "\n"
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE}: {sum(map(len, found.values()))} runs")


def read_results(folder: Path) -> tuple[dict[tuple[str, str], list[Result]], dict[str, dict[str, Result]]]:
    """Results by (arm, extension), their seeds in order; closed forms by extension."""
    found: dict[tuple[str, str], list[Result]] = defaultdict(list)
    closed: dict[str, dict[str, Result]] = {}
    for file in sorted(folder.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if "closed" in result:
            closed[result["to"]] = result["closed"]
        else:
            found[result["arm"], result["to"]].append(result)
    return dict(found), closed


def _table(arms: Mapping[str, list[Result]], closed: Mapping[str, Result]) -> list[str]:
    yarn = closed["yarn"]["perplexity"]["report"]
    yardstick = arms.get(YARDSTICK, [])
    lines = [
        "| | seeds | cost | seconds | validation | report | vs YaRN | vs Algorithm 1 | Δ nats | gap | passkeys |",
        "|---|---:|---:|---:|---|---|---:|---:|---|---:|---|",
    ]
    for name, result in closed.items():
        report, right = result["perplexity"]["report"], result["passkeys"]
        base = _ratio(report, mean_report(yardstick)) if yardstick else ""
        chosen = result["perplexity"]["validation"]
        lines.append(
            f"| {name} | | 0 | | {chosen:.3f} | {report:.3f} | {_ratio(report, yarn)} | {base} | | | "
            f"{_passkeys(right, PASSKEYS)} |"
        )
    return lines + [_row(name, runs, yarn, yardstick) for name, runs in arms.items()]


def _row(name: str, runs: Sequence[Result], yarn: float, yardstick: Sequence[Result]) -> str:
    reports = [run["perplexity"]["report"] for run in runs]
    chosen = [run["perplexity"]["validation"] for run in runs]
    forwards = statistics.mean(_forwards(run) for run in runs)
    against = _ratio(mean_report(runs), mean_report(yardstick)) if yardstick else ""
    nats = _paired(runs, yardstick) if yardstick and runs is not yardstick else ""
    gaps = [overfitting_gap(run, yarn) for run in runs]
    right = [run["passkeys"] for run in runs if run["passkeys"] is not None]
    seconds = statistics.mean(run["seconds"] for run in runs)
    return (
        f"| **{name}** | {len(runs)} | {forwards:,.0f} | {seconds:,.0f} | {_spread(chosen)} | {_spread(reports)} | "
        f"{_ratio(mean_report(runs), yarn)} | {against} | {nats} | {100 * statistics.mean(gaps):+.1f} % | "
        f"{_passkeys(sum(right), PASSKEYS * len(right)) if right else ''} |"
    )


def mean_report(runs: Sequence[Result]) -> float:
    """Mean report perplexity over the seeds."""
    reports: list[float] = [run["perplexity"]["report"] for run in runs]
    return statistics.mean(reports)


def overfitting_gap(run: Result, yarn_on_report: float) -> float:
    """(searched ÷ YaRN on report) ÷ (searched ÷ YaRN on the search documents) − 1."""
    seen = run["perplexity"]["search"] / run["yarn_on_search"]
    return float(run["perplexity"]["report"] / yarn_on_report / seen - 1.0)


def _forwards(run: Result) -> float:
    population = ARMS[run["arm"]].counts_search_alone
    return float(run["search_forwards"] + (0 if population else run["other_forwards"]))


def _paired(runs: Sequence[Result], yardstick: Sequence[Result]) -> str:
    ours, others = (np.mean([run["report_losses"] for run in each], axis=0) for each in (runs, yardstick))
    low, high = bootstrap_interval(ours - others)
    return f"{np.mean(ours - others):+.4f} ({low:+.4f} … {high:+.4f})"


def wilson_interval(right: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share, Wilson's score."""
    z, share = 1.959964, right / trials
    middle = share + z * z / (2 * trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (middle - half) / (1 + z * z / trials), (middle + half) / (1 + z * z / trials)


def _passkeys(right: int, trials: int) -> str:
    low, high = wilson_interval(right, trials)
    return f"{100 * right / trials:.1f} % ({100 * low:.1f} … {100 * high:.1f})"


def _ratio(value: float, base: float) -> str:
    return f"{100 * (value / base - 1.0):+.1f} %"


def _spread(values: Sequence[float]) -> str:
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f} … {max(values):.3f})"
