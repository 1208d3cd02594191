"""Perplexity of the "truncated" protocol by length and by span, with intervals over documents and paired differences."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longrope_export.evaluation.document_passes import document_losses, pass_units, plan_passes
from longrope_export.evaluation.protocol import Request, TaskOption, Unit, Value, Wanted
from longrope_export.evaluation.rows import ModelRow
from longrope_export.evaluation.spans import default_span_edges
from longrope_export.evaluation.statistics import difference_entry, perplexity_entry

if TYPE_CHECKING:
    from rich.table import Table

Losses = list[npt.NDArray[np.float32]]


class PerplexityTask:
    """At length n the targets are tokens 2…n; ΣNLL / Σtokens over all documents."""

    name = "perplexity"
    summary = "token-weighted perplexity by length and by span of positions"
    options: tuple[TaskOption, ...] = ()

    def document_tokens(self, request: Request) -> int:
        """The longest length."""
        return max(request.lengths)

    def wanted(self, request: Request) -> list[Wanted]:
        """Every length, with the factors that a row of this length gets."""
        return [Wanted(length) for length in request.lengths]

    def units(self, request: Request, row: ModelRow) -> list[Unit]:
        """A pass for every set of factors and document."""
        return pass_units(request, row, self.wanted(request))

    def results(
        self, request: Request, rows: Sequence[ModelRow], values: Mapping[str, Mapping[str, Value]]
    ) -> dict[str, Any]:
        """By row: entries by length with the difference to the first row, and the spans of the longest length."""
        reference = self._losses(request, rows[0], values[rows[0].name])
        return {
            "protocol": "truncated",
            "lengths": list(request.lengths),
            "window": request.window,
            "offset": request.offset,
            "documents": [document.name for document in request.documents],
            "rows": {
                row.name: self._row(request, row, values[row.name], None if row is rows[0] else reference)
                for row in rows
            },
        }

    def _losses(self, request: Request, row: ModelRow, values: Mapping[str, Value]) -> dict[int, Losses]:
        return {entry.length: document_losses(request, row, entry, values) for entry in self.wanted(request)}

    def _row(
        self, request: Request, row: ModelRow, values: Mapping[str, Value], reference: dict[int, Losses] | None
    ) -> dict[str, Any]:
        plan, losses = plan_passes(request, row), self._losses(request, row, values)
        passes = {plan[entry] for entry in self.wanted(request)}
        longest = max(request.lengths)
        return {
            "lengths": [
                {
                    "length": length,
                    "set": plan[Wanted(length)].label,
                    **length_entry(found, None if reference is None else reference[length]),
                }
                for length, found in losses.items()
            ],
            "spans": list(spans(losses[longest], default_span_edges(longest, request.window))),
            "forward_passes": len(passes) * len(request.documents),
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Perplexity by row and length, and by row and span."""
        from longrope_export.evaluation.tables import length_table, span_table

        title = f"Perplexity on {len(result['documents'])} documents, window {result['window']:,} tokens"
        if result["offset"]:
            title += f", positions from {result['offset']:,}"
        return [length_table(title, result), span_table(result)]

    def measures(self, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Perplexities by length and span, and differences in nats a token."""
        for name, row in result["rows"].items():
            yield from length_measures(name, row["lengths"])
            for span in row["spans"]:
                yield {"row": name, "metric": "perplexity", "value": span["perplexity"], "count": span["tokens"],
                       **{key: span[key] for key in ("start", "end", "low", "high")}}  # fmt: skip


def length_entry(losses: Losses, reference: Losses | None) -> dict[str, Any]:
    """Perplexity of all documents' `losses`, each document's mean NLL, and the paired difference to `reference`."""
    sums, counts = totals(losses), [len(values) for values in losses]
    return {
        **perplexity_entry(sums, counts),
        "documents": [total / count for total, count in zip(sums, counts)],
        "difference": None if reference is None else difference_entry(sums, totals(reference), counts),
    }


def totals(losses: Losses) -> list[float]:
    """ΣNLL of each document, in float64."""
    return [float(values.sum(dtype=np.float64)) for values in losses]


def spans(losses: Losses, edges: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Perplexity of the target tokens with index in [start, end), for each two neighbouring `edges`."""
    for start, end in itertools.pairwise(edges):
        parts = [values[max(start, 1) - 1 : end - 1] for values in losses]
        if len(parts[0]):
            yield {"start": start, "end": end, **perplexity_entry(totals(parts), [len(part) for part in parts])}


def length_measures(name: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """CSV lines of entries by length: the perplexity, and the difference where there is one."""
    for entry in entries:
        place = {"row": name, "length": entry["length"], "set": entry["set"]}
        shown = {key: entry[key] for key in ("low", "high")}
        yield {**place, "metric": "perplexity", "value": entry["perplexity"], "count": entry["tokens"], **shown}
        if entry["difference"]:
            found = entry["difference"]
            yield {**place, "metric": "nll difference", "value": found["nll"], "low": found["low"],
                   "high": found["high"], "count": entry["tokens"]}  # fmt: skip


TASK = PerplexityTask()
