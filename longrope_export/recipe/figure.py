"""The figure of a recipe's card: perplexity by length of the given model, its closed forms, and after every stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from longrope_export.report.card_figure import card_figure
from longrope_export.report.results import Evaluation, Method, Point
from longrope_export.report.style import Picture

BEFORE = "before"


def stage_figure(results: Sequence[Mapping[str, Any]], window: int) -> Picture | None:
    """What was measured before the first stage, and each stage's own factors after it; None without measurements.

    `window` is the given model's. Closed forms on weights that were tuned are in the table alone.
    """
    return card_figure(Evaluation("recipe", window=window, methods=tuple(_methods(results))))


def _methods(results: Sequence[Mapping[str, Any]]) -> Iterator[Method]:
    measured = [result for result in results if "perplexity" in result]
    for result in measured:
        stage = result["stage"]
        for name, values in result["perplexity"].items():
            points = tuple(Point(int(length), value) for length, value in values.items())
            if stage == BEFORE:
                yield Method(name, points)
            elif name == stage:
                yield Method(f"after {stage}", points, own=result is measured[-1])
