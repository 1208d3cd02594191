"""What the old window lost: perplexity at L with the short and with the long factors, as ratios to the unmodified model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from longrope_export.errors import LongRopeError
from longrope_export.evaluation.document_passes import document_losses, pass_units
from longrope_export.evaluation.protocol import Request, TaskOption, Unit, Value, Wanted
from longrope_export.evaluation.rows import ModelRow
from longrope_export.evaluation.statistics import exp, ratio_entry, weighted_mean
from longrope_export.evaluation.tasks.perplexity import totals

if TYPE_CHECKING:
    from rich.table import Table


class RetentionTask:
    """Twice: runtimes that choose by the context (llama.cpp with a large one, vLLM) use the long set on short prompts."""

    name = "retention"
    summary = "perplexity at the window with short and with long factors against the unmodified model's"
    options: tuple[TaskOption, ...] = ()

    def document_tokens(self, request: Request) -> int:
        """The window L."""
        return request.window

    def wanted(self, request: Request) -> list[Wanted]:
        """The window with either set."""
        return [Wanted(request.window, "short"), Wanted(request.window, "long")]

    def units(self, request: Request, row: ModelRow) -> list[Unit]:
        """A pass with either set (one where they are the same), unless another task's serves."""
        if request.reference is None:
            raise LongRopeError("retention compares with the unmodified model: add unchanged to --methods")
        return pass_units(request, row, self.wanted(request))

    def results(
        self, request: Request, rows: Sequence[ModelRow], values: Mapping[str, Mapping[str, Value]]
    ) -> dict[str, Any]:
        """By row: perplexity and ratio of either set; the reference row has neither."""
        reference = next(row for row in rows if row.name == request.reference)
        short, long = self.wanted(request)
        base = document_losses(request, reference, short, values[reference.name])
        sums, counts = totals(base), [len(losses) for losses in base]

        def entry(row: ModelRow, wanted: Wanted) -> dict[str, Any]:
            return ratio_entry(totals(document_losses(request, row, wanted, values[row.name])), sums, counts)

        return {
            "window": request.window,
            "reference": reference.name,
            "perplexity": exp(weighted_mean(sums, counts)),
            "rows": {
                row.name: {"short": entry(row, short), "long": entry(row, long)} for row in rows if row is not reference
            },
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """One table; none where there is only the unmodified model."""
        from longrope_export.evaluation.tables import retention_table

        return [retention_table(result)] if result["rows"] else []

    def measures(self, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The ratios and perplexities by row and set."""
        for name, row in result["rows"].items():
            for which, entry in row.items():
                place = {"row": name, "length": result["window"], "set": which}
                yield {**place, "metric": "retention ratio", "value": entry["ratio"], "low": entry["low"],
                       "high": entry["high"]}  # fmt: skip
                yield {**place, "metric": "retention perplexity", "value": entry["perplexity"]}


TASK = RetentionTask()
