"""`longrope demo`: the main job on the embedded model, on texts that every machine has, in a few minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export import pipeline
from longrope_export.demo import demo_model_path
from longrope_export.denormals import flushed_denormals
from longrope_export.description import ModelDescription, describe
from longrope_export.evaluation.documents import Row, load_tokenizer, rows_from_texts
from longrope_export.evaluation.passes import fixed_set
from longrope_export.evaluation.passkey import evaluate_passkey
from longrope_export.evaluation.stdlib_corpus import Split, documents
from longrope_export.evaluation.tables import ComparisonTable, compare_methods
from longrope_export.loader import load
from longrope_export.scaling import RopeScaling
from longrope_export.versions import versions

Say = Callable[[str], None]
# What is written is found for both formats: a GGUF holds one attention factor and no start tokens. The other row shows
# what transformers alone could apply.
SEARCHED, SEARCHED_HF = "searched", "searched, for transformers alone"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Sizes of the demo; the defaults fit into five minutes on two cores.

    Budgets are in evaluations: forward passes over all documents of that search; a gradient counts three. Descent takes
    one text a step, so that more texts cost it nothing and generalise better; Algorithm 1 has the paper's five.
    """

    out: Path
    factor: int = 8
    gradient_documents: int = 16
    gradient_budget: int = 20
    evolution_documents: int = 5
    evolution_budget: int = 64
    validation_documents: int = 2
    report_documents: int = 16
    passkeys: int = 20
    seed: int = 0
    verify: bool = True


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured: the table, passkey accuracy {factors: {length: share}}, the verdict and what was written."""

    comparison: ComparisonTable
    passkey: dict[str, dict[int, float]]
    written: pipeline.Written
    verification: Any
    scaling: RopeScaling
    evaluations: dict[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "comparison": self.comparison.to_dict(),
            "passkey": {name: {str(k): v for k, v in row.items()} for name, row in self.passkey.items()},
            "evaluations": self.evaluations,
            "verification": None if self.verification is None else self.verification.to_dict(),
            "written": str(self.written.target),
            "gguf": str(self.written.gguf),
            "scaling": self.scaling.to_dict(),
            "seconds": round(self.seconds, 1),
        }


@flushed_denormals()  # before torch's threads begin
def run_demo(options: DemoOptions, say: Say) -> DemoResult:
    """Search, compare, write and prove; `say` gets one line per step. Raises `LongRopeError` for user errors."""
    started = time.perf_counter()
    description = describe(demo_model_path())
    window, target = description.window, description.window * options.factor
    plan = pipeline.plan_output(description, target, options.out, hf=True, gguf=True)
    plan.check_free(overwrite=False)
    model, tokenizer = load(demo_model_path()), load_tokenizer(demo_model_path())
    rows = _rows(tokenizer, target, options)
    say(f"embedded model: {description.parameters:,} parameters, window {window} tokens, extended to {target}")
    found, spent = _searches(model, tokenizer, description, rows, options, say)
    scalings = _scalings(description, target, found)
    say(f"measuring {len(scalings)} settings on {options.report_documents} unseen documents of {target} tokens")
    comparison = compare_methods(model, rows["report"], _lengths(window, target), scalings, window=window)
    passkey = _passkeys(model, tokenizer, scalings, _lengths(window, target), options, say)
    scaling = found[SEARCHED]
    written = _write(description, scaling, plan, comparison, options)
    say("running the written files in transformers and in llama.cpp")
    verification = _verify(plan.target) if options.verify else None
    return DemoResult(comparison, passkey, written, verification, scaling, spent, time.perf_counter() - started)


def _lengths(window: int, target: int) -> list[int]:
    lengths = [window]
    while lengths[-1] * 2 <= target:
        lengths.append(lengths[-1] * 2)
    return lengths


def _rows(tokenizer: Any, target: int, options: DemoOptions) -> dict[Split, list[Row]]:
    """Disjoint texts: to search on, to choose on, and to report on."""
    counts: dict[Split, int] = {
        "search": max(options.gradient_documents, options.evolution_documents),
        "validation": options.validation_documents,
        "report": options.report_documents,
    }
    return {
        split: rows_from_texts(((entry.name, entry.text) for entry in documents(split)), tokenizer, target, count)
        for split, count in counts.items()
    }


def _searches(
    model: Any,
    tokenizer: Any,
    description: ModelDescription,
    rows: dict[Split, list[Row]],
    options: DemoOptions,
    say: Say,
) -> tuple[dict[str, RopeScaling], dict[str, float]]:
    """Searches on the same texts: the paper's Algorithm 1 on a small budget, and gradient descent on log λ, twice."""
    from longrope_export.search.run import SearchConfig, numbers_of, search_factors

    numbers = numbers_of(description, f"{options.factor}x")
    descent = ("gradient", options.gradient_documents, options.gradient_budget)
    algorithm_1 = ("evolution", options.evolution_documents, options.evolution_budget)
    found, spent = {}, {}
    for name, runtime, (strategy, count, budget) in (
        ("Algorithm 1", "gguf", algorithm_1),
        (SEARCHED, "gguf", descent),
        (SEARCHED_HF, "hf", descent),
    ):
        say(f"search: {strategy}, {budget} evaluations of {count} documents, for {runtime}")
        texts = [row.token_ids for row in [*rows["search"][:count], *rows["validation"]]]
        config = SearchConfig(
            strategy=strategy,  # type: ignore[arg-type]
            target=f"{options.factor}x",
            budget=str(budget),
            documents=count,
            validation_documents=options.validation_documents,
            seed=options.seed,
            runtime=runtime,  # type: ignore[arg-type]
        )
        result = search_factors(model, numbers, texts, config, tokenizer=tokenizer)
        label = _algorithm_1(result.evaluations, config) if strategy == "evolution" else name
        found[label], spent[label] = result.scaling, result.evaluations
    return found, spent


def _algorithm_1(evaluations: float, config: Any) -> str:
    return f"Algorithm 1 ({evaluations:.0f} of {config.evolution.evaluations:,} evaluations)"


def _scalings(
    description: ModelDescription, target: int, found: Mapping[str, RopeScaling]
) -> dict[str, RopeScaling | None]:
    closed = {
        label: pipeline.closed_form_scaling(description, target, method)
        for label, method in (("PI", "pi"), ("NTK", "ntk"), ("YaRN", "yarn"))
    }
    return {"unchanged": None, **closed, **found}


def _passkeys(
    model: Any,
    tokenizer: Any,
    scalings: Mapping[str, RopeScaling | None],
    lengths: list[int],
    options: DemoOptions,
    say: Say,
) -> dict[str, dict[int, float]]:
    say(f"passkey retrieval, {options.passkeys} prompts a length")
    result: dict[str, dict[int, float]] = {}
    for name in ("unchanged", "YaRN", SEARCHED, SEARCHED_HF):
        scaling = scalings[name]
        if scaling is None:
            measured = evaluate_passkey(model, tokenizer, lengths, options.passkeys, options.seed)
        else:
            with fixed_set(model, scaling, "long"):
                measured = evaluate_passkey(model, tokenizer, lengths, options.passkeys, options.seed)
        result[name] = {length: measured.accuracy(length) or 0.0 for length in lengths}
    return result


def _write(
    description: ModelDescription,
    scaling: RopeScaling,
    plan: pipeline.OutputPlan,
    comparison: ComparisonTable,
    options: DemoOptions,
) -> pipeline.Written:
    from longrope_export.converters.card import CardContents
    from longrope_export.report.card_figure import card_figure
    from longrope_export.report.comparisons import COMPARISON_FILE, comparison_document
    from longrope_export.report.evaluations import read_evaluation

    command = f"longrope demo --seed {options.seed}"
    measured = comparison_document(comparison, command, options.seed, versions(), own=SEARCHED)
    card = CardContents(
        name=f"longrope-demo-{pipeline.length_name(scaling.max_position_embeddings)}",
        scaling=scaling,
        command=command,
        figure=card_figure(read_evaluation(measured, "demo")),
        table=table_cells(comparison),
        table_caption=f"Perplexity on {len(comparison.documents)} documents that nothing was chosen on.",
        versions=versions(),
    )
    extras = {COMPARISON_FILE: json.dumps(measured, indent=1, allow_nan=False) + "\n"}
    return pipeline.write_extended(description, scaling, plan, card=card, dtype="f32", extra_texts=extras)


def table_cells(table: ComparisonTable) -> list[list[str]]:
    """The comparison as text cells: a header row, then one row per setting."""
    from longrope_export.report.numbers import perplexity_text

    header = ["factors", "1× short set", *(f"{length // table.window}×" for length in table.lengths)]
    rows = [
        [
            row.name,
            perplexity_text(table.short_perplexity(row.name)),
            *(perplexity_text(table.perplexity(row.name, length)) for length in table.lengths),
        ]
        for row in table.rows
    ]
    return [header, *rows]


def _verify(target: Path) -> Any:
    from longrope_export.converters.verify import verify

    return verify(target)
