"""Needle perplexity (LongRoPE2, arXiv 2502.20082): the loss of a hidden number's tokens alone, at stratified depths.

Every needle is scored twice, with the needle in the text and without it. What differs is what the model took from the
needle; where nothing differs the needle was not seen at all, and the score says nothing about the window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from longrope_export.errors import TextTooShortError
from longrope_export.evaluation.needles import TEMPLATES, NeedleRow
from longrope_export.evaluation.protocol import Engine, Request, TaskOption, Unit, Value
from longrope_export.evaluation.rows import ModelRow
from longrope_export.evaluation.statistics import difference_entry, exp, perplexity_entry, weighted_mean
from longrope_export.evaluation.tasks.needle import TEMPLATE, needle_rows
from longrope_export.evaluation.tasks.retrieval import ids_digest, option

if TYPE_CHECKING:
    from rich.table import Table

TRIALS = 10


class NeedlePerplexityTask:
    """exp of the mean loss over the answers' tokens of all trials."""

    name = "needle-perplexity"
    summary = "perplexity of a hidden number's tokens, with the number in the text and without"
    options = (
        TaskOption(
            "needle_perplexity_trials",
            "Needles per length; trial i is at depth (i + ½)/trials.",
            TRIALS,
            click.IntRange(min=1),
        ),
        TaskOption(
            "needle_perplexity_template",
            "What is hidden: LongRoPE2's magic number, or a pass key.",
            TEMPLATE,
            click.Choice(list(TEMPLATES)),
        ),
    )

    def document_tokens(self, request: Request) -> int:
        """The longest length."""
        return max(request.lengths)

    def units(self, request: Request, row: ModelRow) -> list[Unit]:
        """One unit a trial, which runs two forward passes."""
        return [
            Unit(_key(hidden), len(hidden.token_ids), 2 * len(hidden.token_ids), partial(_score, hidden, control))
            for hidden, control in _pairs(request)
        ]

    def results(
        self, request: Request, rows: Sequence[ModelRow], values: Mapping[str, Mapping[str, Value]]
    ) -> dict[str, Any]:
        """By row and length: perplexity with the needle, without it, and the difference to the first row."""
        pairs = [hidden for hidden, _ in _pairs(request)]
        reference = rows[0].name
        return {
            "template": option(request, "needle_perplexity_template", TEMPLATE),
            "depths": sorted({hidden.depth for hidden in pairs}),
            "documents": [document.name for document in request.documents],
            "rows": {
                row.name: {
                    "lengths": [
                        _entry(length, pairs, values[row.name], None if row.name == reference else values[reference])
                        for length in request.lengths
                    ]
                }
                for row in rows
            },
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Needle perplexity by row and length."""
        from rich.table import Table
        from rich.text import Text

        from longrope_export.report.numbers import perplexity_text

        drawn = Table(title="Needle perplexity (answer tokens only)")
        drawn.add_column("factors")
        for name in ("tokens", "trials", "with the needle", "without it", "not seen"):
            drawn.add_column(name, justify="right")
        for name, row in result["rows"].items():
            for entry in row["lengths"]:
                cells = [perplexity_text(entry["perplexity"]), perplexity_text(entry["without"])]
                unseen = f"{entry['unseen']}/{entry['trials']}"
                drawn.add_row(Text(name), f"{entry['length']:,}", str(entry["trials"]), *cells, unseen)
        return [drawn]

    def measures(self, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Both perplexities by row and length."""
        for name, row in result["rows"].items():
            for entry in row["lengths"]:
                common = {"row": name, "length": entry["length"], "count": entry["tokens"]}
                ends = {"low": entry["low"], "high": entry["high"]}
                yield {**common, **ends, "metric": "needle perplexity", "value": entry["perplexity"]}
                yield {**common, "metric": "perplexity without the needle", "value": entry["without"]}


def _pairs(request: Request) -> list[tuple[NeedleRow, NeedleRow]]:
    """Every row with its control."""
    trials = option(request, "needle_perplexity_trials", TRIALS)
    depths = [(index + 0.5) / trials for index in range(trials)]
    template = option(request, "needle_perplexity_template", TEMPLATE)
    both = (needle_rows(request, depths, template, hidden=hidden) for hidden in (True, False))
    return list(zip(*both))


def _key(row: NeedleRow) -> str:
    return f"needle-perplexity {len(row.token_ids)} depth {row.depth:.4g} {ids_digest(row.token_ids.tolist())}"


def _score(hidden: NeedleRow, control: NeedleRow, engine: Engine) -> Value:
    return {"losses": answer_losses(engine, hidden), "without": answer_losses(engine, control)}


def answer_losses(engine: Engine, row: NeedleRow) -> Any:
    """Losses of the answer's tokens, float32; raises `TextTooShortError` when one of them was cut off."""
    losses = engine.losses(row.token_ids, first=len(row.token_ids) - row.answer_tokens)
    if not row.answer_tokens or len(losses) != row.answer_tokens:
        raise TextTooShortError(
            f"{len(losses)} of the answer's {row.answer_tokens} tokens were scored: the row was cut; use longer texts"
        )
    return losses


def _entry(
    length: int, rows: Sequence[NeedleRow], values: Mapping[str, Value], reference: Mapping[str, Value] | None
) -> dict[str, Any]:
    keys = [_key(row) for row in rows if len(row.token_ids) == length]
    answers = [values[key] for key in keys]
    counts = [len(answer["losses"]) for answer in answers]
    sums = [_sum(answer["losses"]) for answer in answers]
    other = None if reference is None else [_sum(reference[key]["losses"]) for key in keys]
    return {
        "length": length,
        "trials": len(keys),
        **perplexity_entry(sums, counts),
        "without": exp(weighted_mean([_sum(answer["without"]) for answer in answers], counts)),
        "unseen": sum(np.array_equal(answer["losses"], answer["without"]) for answer in answers),
        "difference": None if other is None else difference_entry(sums, other, counts),
    }


def _sum(losses: Any) -> float:
    return float(np.sum(losses, dtype=np.float64))


TASK = NeedlePerplexityTask()
