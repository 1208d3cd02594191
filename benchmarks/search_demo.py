"""Search strategies on the demo model: perplexity on search documents and on documents that no search saw.

    python benchmarks/search_demo.py                 # gradient at several budgets, Algorithm 1 with 100 evaluations
    python benchmarks/search_demo.py --full          # Algorithm 1 in full (1,344 evaluations) as well

Texts are the held-out modules of Python's standard library: split "search" to search on, "validation" to choose on,
"report" to test on. One evaluation is one candidate on all search documents; a gradient counts three forward passes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import longrope_export
from longrope_export.description import describe
from longrope_export.evaluation.documents import load_tokenizer, rows_from_texts
from longrope_export.evaluation.stdlib_corpus import Split, documents
from longrope_export.loader import load
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors import InProcess
from longrope_export.search.factors import search_factors
from longrope_export.search.objective import ModelObjective
from longrope_export.search.run import SearchConfig, numbers_of
from longrope_export.search.space import Candidate, RopeNumbers, closed_form

DEMO_MODEL = Path(longrope_export.__file__).parent / "demo_model"


def main() -> None:
    """Run everything and print one table."""
    options = _options()
    torch.set_num_threads(options.threads)
    numbers = numbers_of(describe(options.model), options.to)
    tokenizer = load_tokenizer(options.model)
    model = load(options.model, dtype=getattr(torch, options.dtype))
    parts: dict[Split, int] = {"search": options.documents, "validation": options.validation, "report": options.test}
    rows = {split: _rows(split, tokenizer, numbers.target, count) for split, count in parts.items()}
    print(
        f"{numbers.window:,} → {numbers.target:,} tokens; " + ", ".join(f"{len(rows[s])} {s}" for s in rows), flush=True
    )
    results = [_measured(name, candidate, model, numbers, rows, 1.0) for name, candidate in _closed_forms(numbers)]
    for strategy, budget in _budgets(options):
        results.append(_searched(strategy, budget, model, numbers, rows, options))
    if options.json:
        print(json.dumps(results, indent=2))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--to", default="8x")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--validation", type=int, default=4)
    parser.add_argument("--test", type=int, default=8)
    parser.add_argument("--gradient", type=float, nargs="*", default=[7.5, 15, 30, 60, 120])
    parser.add_argument("--evolution", type=float, nargs="*", default=[100])
    parser.add_argument("--full", action="store_true", help="Algorithm 1 with all of its 1,344 evaluations too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def _budgets(options: argparse.Namespace) -> list[tuple[str, float]]:
    evolution = [*options.evolution, *([1344.0] if options.full else [])]
    return [("gradient", budget) for budget in options.gradient] + [("evolution", budget) for budget in evolution]


def _rows(split: Split, tokenizer: Any, length: int, count: int) -> list[np.ndarray[Any, Any]]:
    """The first rows of `length` tokens of the split's documents, one from each, then second pieces and so on."""
    texts = ((document.name, document.text) for document in documents(split))
    return [row.token_ids for row in rows_from_texts(texts, tokenizer, length, count)]


def _closed_forms(numbers: RopeNumbers) -> list[tuple[str, Candidate]]:
    names = ("pi", "ntk", "yarn", "critical-dim")
    return [("unchanged", numbers.unchanged()), *((name, closed_form(name, numbers)) for name in names)]


def _searched(
    strategy: str, budget: float, model: Any, numbers: RopeNumbers, rows: dict[Split, Any], options: argparse.Namespace
) -> dict[str, Any]:
    config = SearchConfig(
        strategy=strategy, budget=str(budget), documents=len(rows["search"]), seed=options.seed, short="original",
        validation_documents=len(rows["validation"]), start_tokens=None if strategy == "evolution" else (0,),
    )  # fmt: skip
    started = time.perf_counter()
    result = search_factors(model, numbers, [*rows["search"], *rows["validation"]], config)
    seconds = time.perf_counter() - started
    record = result.scaling
    found = Candidate(record.long_factor, record.long_attention_factor, record.long_start_tokens)
    label = f"{strategy} ({result.chosen})"
    return _measured(label, found, model, numbers, rows, result.evaluations, seconds)


def _measured(
    name: str,
    candidate: Candidate,
    model: Any,
    numbers: RopeNumbers,
    rows: dict[Split, Any],
    evaluations: float,
    seconds: float = 0.0,
) -> dict[str, Any]:
    objective = ModelObjective(model, numbers, rows)
    evaluator = Evaluator(InProcess(objective), {split: len(found) for split, found in rows.items()})
    scores = {split: math.exp(evaluator.mean_losses([candidate], split)[0]) for split in rows}
    objective.close()
    _print_line(name, evaluations, seconds, list(scores.values()))
    factors = [round(value, 3) for value in candidate.factors]
    return {"name": name, "evaluations": evaluations, "seconds": round(seconds, 1), **scores,
            "attention_factor": candidate.attention_factor, "factors": factors}  # fmt: skip


def _print_line(name: str, evaluations: float, seconds: float, scores: Sequence[float]) -> None:
    columns = "  ".join(f"{score:9.3f}" for score in scores)
    print(
        f"{name:<24} {evaluations:8.1f} evaluations {seconds:8.1f} s   search, validation, test: {columns}", flush=True
    )


if __name__ == "__main__":
    main()
