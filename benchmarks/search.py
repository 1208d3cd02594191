"""Search strategies on the demo model: every arm a command that can be stopped and given again.

    python benchmarks/search.py arms                              # names
    python benchmarks/search.py run evolution --to 8x --seed 0    # one search, and what it is worth
    python benchmarks/search.py closed --to 8x                    # closed forms on the same documents
    python benchmarks/search.py table                             # docs/search-results.md from everything that was run

Journals are in `runs/search/ARM-TO-SEED/` (`--runs`), results in `benchmarks/results/search/`: an arm that has a result
is not run again. Everything is float32 on one thread. Searches draw their documents by seed from 64 rows of the
standard library's split "search"; 8 rows of "validation" choose, 26 documents of "report" are only reported on.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from search_arms import CLOSED_FORMS, PASSKEYS, Bench, measured, run_arm
from search_list import ARMS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "search"


def main() -> None:
    """Run what the command line names."""
    options = _options()
    if options.command == "arms":
        for arm in ARMS.values():
            print(f"{arm.name:<24} seeds {', '.join(map(str, arm.seeds)):<10} {arm.about}")
    elif options.command == "run":
        _run(options)
    elif options.command == "closed":
        _closed(options.to, options.results)
    else:
        from search_tables import write_tables

        write_tables(options.results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("arms", help="names of the arms")
    run = commands.add_parser("run", help="one arm with one seed")
    run.add_argument("arm", choices=sorted(ARMS))
    run.add_argument("--to", default="8x")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--runs", type=Path, default=Path("runs/search"))
    closed = commands.add_parser("closed", help="the closed forms")
    closed.add_argument("--to", default="8x")
    commands.add_parser("table", help="write docs/search-results.md")
    return parser.parse_args()


def _run(options: argparse.Namespace) -> None:
    name = f"{options.arm}-{options.to}-{options.seed}"
    target = options.results / f"{name}.json"
    if not target.exists():
        arm = ARMS[options.arm]
        result = run_arm(Bench.open(options.to), arm, options.seed, options.runs / name)
        _write(target, {"arm": arm.name, "to": options.to, **result})
    print(f"{name}: {_line(json.loads(target.read_text(encoding='utf-8')))}", flush=True)


def _closed(to: str, results: Path) -> None:
    target = results / f"closed-{to}.json"
    if not target.exists():
        bench = Bench.open(to)
        rows = bench.rows["search"]
        found = {name: measured(bench, bench.candidate(name), rows) for name in CLOSED_FORMS}
        _write(target, {"to": to, "closed": found})
    for name, result in json.loads(target.read_text(encoding="utf-8"))["closed"].items():
        print(f"{name:<14}{_line(result)}")


def _line(result: dict[str, Any]) -> str:
    perplexities = "  ".join(f"{split} {value:.3f}" for split, value in result["perplexity"].items())
    spent = f"{result['token_forwards']:,.0f} token-forwards, {result['seconds']} s; " if "seconds" in result else ""
    passkeys = "" if result["passkeys"] is None else f"; passkeys {result['passkeys']}/{PASSKEYS}"
    return f"{spent}{perplexities}{passkeys}"


def _write(target: Path, result: dict[str, Any]) -> None:
    machine = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps({**result, "made_with": machine}, indent=1) + "\n", encoding="utf-8")
    partial.replace(target)


if __name__ == "__main__":
    main()
