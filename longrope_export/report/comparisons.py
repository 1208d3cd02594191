"""A comparison of several factors on one model, as the result file that the report and `longrope eval` share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from longrope_export.report.evaluations import FORMAT

if TYPE_CHECKING:
    from longrope_export.evaluation.tables import ComparisonRow, ComparisonTable

COMPARISON_FILE = "evaluation.json"


def comparison_document(
    table: ComparisonTable, command: str, seed: int, versions: Mapping[str, str], own: str | None = None
) -> dict[str, Any]:
    """The JSON-ready result of `table`; `own` is the row that was written into the model's files."""
    reference = table.rows[0].short.at(table.window).perplexity
    return {
        "format": FORMAT,
        "command": command,
        "window": table.window,
        "lengths": list(table.lengths),
        "seed": seed,
        "runtime": "transformers",
        "rows": [_row(row, own) for row in table.rows],
        "data": {
            "paths": [],
            "documents": [{"name": name, "tokens": max(table.lengths)} for name in table.documents],
            "sha256": table.data_hash,
        },
        "tasks": {
            "perplexity": {"window": table.window, "rows": {row.name: row.perplexity.to_dict() for row in table.rows}},
            "retention": {
                "window": table.window,
                "reference": table.rows[0].name,
                "rows": {row.name: _retention(table, row, reference) for row in table.rows[1:]},
            },
        },
        "seconds": round(table.seconds, 3),
        "versions": dict(versions),
    }


def _row(row: ComparisonRow, own: str | None) -> dict[str, Any]:
    scaling = None if row.scaling is None else row.scaling.to_dict()
    return {"name": row.name, "method": "record" if row.name == own else row.name, "scaling": scaling}


def _retention(table: ComparisonTable, row: ComparisonRow, reference: float) -> dict[str, Any]:
    values = {"short": row.short.at(table.window).perplexity, "long": row.perplexity.at(table.window).perplexity}
    return {name: {"perplexity": value, "ratio": value / reference} for name, value in values.items()}
