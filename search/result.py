"""What a search found, with its scores and its costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longrope_export.scaling import RopeScaling


@dataclass(frozen=True)
class SearchResult:
    """The record found, and how: perplexities by candidate, what was spent, and remarks for the user.

    All perplexities are exp of the objective, which is the perplexity of whole documents unless `objective` says
    otherwise; `retention` is always perplexity, at the window L. `evaluations` are candidates measured on all search
    documents (a gradient counts 3; a pass at another length in proportion), `validation_evaluations` the same spent on
    the documents that only choose or report. `history` is the best loss after each generation, or the loss at each
    step. `documents` is how many were searched on. `complete` is False for the best so far of a search that was stopped.
    """

    scaling: RopeScaling
    chosen: str
    short_chosen: str
    search_perplexity: Mapping[str, float]
    validation_perplexity: Mapping[str, float]
    evaluations: float
    validation_evaluations: float
    history: tuple[float, ...]
    notes: tuple[str, ...]
    objective: str = "perplexity"
    report_perplexity: Mapping[str, float] = field(default_factory=dict)
    retention: Mapping[str, float] = field(default_factory=dict)
    complete: bool = True
    documents: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "scaling": self.scaling.to_dict(),
            "chosen": self.chosen,
            "short_chosen": self.short_chosen,
            "objective": self.objective,
            "search_perplexity": finite_values(self.search_perplexity),
            "validation_perplexity": finite_values(self.validation_perplexity),
            "report_perplexity": finite_values(self.report_perplexity),
            "retention": finite_values(self.retention),
            "evaluations": self.evaluations,
            "validation_evaluations": self.validation_evaluations,
            "history": [value if math.isfinite(value) else None for value in self.history],
            "notes": list(self.notes),
            "complete": self.complete,
            "documents": self.documents,
        }


def finite_values(values: Mapping[Any, float]) -> dict[str, float | None]:
    """The same with None for what JSON cannot hold."""
    return {str(name): value if math.isfinite(value) else None for name, value in values.items()}
