"""The few numbers at the top of the page: the windows, perplexity at the new length, and what is kept at the old one."""

from __future__ import annotations

from longrope_export.report.numbers import change_text, perplexity_text, share_text, tokens_text
from longrope_export.report.results import UNCHANGED, Evaluation, Method
from longrope_export.report.sources import Sources
from longrope_export.scaling import RopeScaling


def facts(sources: Sources) -> list[tuple[str, str]]:
    """(what, value) of up to eight facts."""
    found = _windows(sources)
    for evaluation in sources.evaluations[:1]:
        found += _perplexity(evaluation) + _retention(evaluation) + _found(evaluation)
    for run in sources.searches[:1]:
        state = "" if run.complete else ", not complete"
        found.append(("search", f"{run.strategy}{state}"))
    return found[:8]


def _windows(sources: Sources) -> list[tuple[str, str]]:
    for evaluation in sources.evaluations:
        if evaluation.records:
            return [_window(evaluation.records[-1][1])]
    return [_window(record) for _, record in sources.records[:1]]


def _window(record: RopeScaling) -> tuple[str, str]:
    window, target = record.original_max_position_embeddings, record.max_position_embeddings
    return f"tokens of window, {record.factor:g}×", f"{window:,} → {target:,}"


def _perplexity(evaluation: Evaluation) -> list[tuple[str, str]]:
    if not evaluation.lengths:
        return []
    length = evaluation.lengths[-1]
    values = {method.name: point.perplexity for method in evaluation.methods if (point := method.at(length))}
    known = {name: value for name, value in values.items() if value is not None}
    if not known:
        return []
    best = min(known, key=known.__getitem__)
    facts = [(f"lowest perplexity at {tokens_text(length)}: {best}", perplexity_text(known[best]))]
    if UNCHANGED in known and best != UNCHANGED:
        facts.append((f"perplexity at {tokens_text(length)}: unchanged", perplexity_text(known[UNCHANGED])))
    return facts


def _retention(evaluation: Evaluation) -> list[tuple[str, str]]:
    method = _last([method for method in evaluation.methods if method.retention])
    if method is None:
        return []
    return [
        (f"perplexity at the old length, {kept.factors} set: {method.name}", change_text(kept.ratio))
        for kept in method.retention
        if kept.ratio is not None
    ]


def _found(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Of each task the last row's share at the longest length."""
    last = {grid.task.partition(",")[0]: grid for grid in evaluation.grids if grid.lengths}
    return [
        (
            f"{grid.task} at {tokens_text(grid.lengths[-1])}: {grid.method}",
            share_text(grid.overall(len(grid.lengths) - 1)),
        )
        for grid in last.values()
    ]


def _last(methods: list[Method]) -> Method | None:
    return methods[-1] if methods else None
