"""Several scalings on one resident model, the same documents and lengths for all: the before/after table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from longrope_export.evaluation.documents import Row, data_hash
from longrope_export.evaluation.passes import fixed_set, original_window
from longrope_export.evaluation.passkey import PasskeyResult
from longrope_export.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from longrope_export.scaling import RopeScaling

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, eq=False)
class ComparisonRow:
    """One scaling: its long set at every length, and its short set at the window (the same one for a static record)."""

    name: str
    scaling: RopeScaling | None
    perplexity: PerplexityResult
    short: PerplexityResult


@dataclass(frozen=True, eq=False)
class ComparisonTable:
    """Perplexities of `rows` × `lengths` on the same `documents`; `window` is L, where the short sets are measured."""

    rows: tuple[ComparisonRow, ...]
    lengths: tuple[int, ...]
    window: int
    documents: tuple[str, ...]
    data_hash: str
    seconds: float

    def perplexity(self, name: str, length: int) -> float:
        """Perplexity of the row `name` at `length`; raises `KeyError` when there is none."""
        return self._row(name).perplexity.at(length).perplexity

    def short_perplexity(self, name: str) -> float:
        """Perplexity of the row `name` with its short set at the window; raises `KeyError` when there is none."""
        return self._row(name).short.at(self.window).perplexity

    def best(self, length: int) -> str:
        """Name of the row with the lowest perplexity at `length`; the first of equal ones."""
        return min(self.rows, key=lambda row: row.perplexity.at(length).perplexity).name

    def _row(self, name: str) -> ComparisonRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: per row the perplexities by length, the short set's, and both results in full."""
        return {
            "window": self.window,
            "lengths": list(self.lengths),
            "documents": list(self.documents),
            "data_sha256": self.data_hash,
            "seconds": round(self.seconds, 3),
            "rows": [self._row_dict(row) for row in self.rows],
        }

    def _row_dict(self, row: ComparisonRow) -> dict[str, Any]:
        return {
            "name": row.name,
            "perplexity": {str(length): row.perplexity.at(length).perplexity for length in self.lengths},
            "short_perplexity": row.short.at(self.window).perplexity,
            "provenance": None if row.scaling is None else dict(row.scaling.provenance),
            "result": row.perplexity.to_dict(),
        }


def compare_methods(
    model: nn.Module,
    rows: Sequence[Row],
    lengths: Sequence[int],
    scalings: Mapping[str, RopeScaling | None],
    *,
    window: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ComparisonTable:
    """Perplexity of every scaling at every length (None: the model as it is), on one resident model.

    Each record's long set is read at all lengths from one forward pass per document; a record whose short set differs
    gets one more pass at `window` (default: the model's L). Afterwards the model rotates as before. Raises as
    `evaluate_perplexity`, and `ScalingError` for a record of another model, before anything is run.
    """
    base = window or original_window(model)
    # A static record's set at the window comes out of the same pass as the longer lengths.
    measured = sorted({*lengths, base})
    counter = _Counter(progress, len(scalings), max(measured) * len(rows))
    for scaling in scalings.values():
        if scaling is not None:
            with fixed_set(model, scaling, "long"):
                pass
    started = time.perf_counter()
    compared = [_compare(model, rows, measured, base, name, scaling, counter) for name, scaling in scalings.items()]
    return ComparisonTable(
        rows=tuple(compared),
        lengths=tuple(sorted(set(lengths))),
        window=base,
        documents=tuple(row.name for row in rows),
        data_hash=data_hash(rows),
        seconds=time.perf_counter() - started,
    )


def _compare(
    model: nn.Module,
    rows: Sequence[Row],
    lengths: Sequence[int],
    window: int,
    name: str,
    scaling: RopeScaling | None,
    counter: _Counter,
) -> ComparisonRow:
    if scaling is None:
        own = evaluate_perplexity(model, rows, lengths, progress=counter.row())
        return ComparisonRow(name, scaling, own, own)
    with fixed_set(model, scaling, "long"):
        long = evaluate_perplexity(model, rows, lengths, progress=counter.row())
    if scaling.is_static:
        return ComparisonRow(name, scaling, long, long)
    with fixed_set(model, scaling, "short"):
        return ComparisonRow(name, scaling, long, evaluate_perplexity(model, rows, [window]))


class _Counter:
    """Adds the rows' progress up to one count over the whole table."""

    def __init__(self, progress: Callable[[int, int], None] | None, rows: int, tokens: int) -> None:
        self.progress, self.rows, self.tokens, self.begun = progress, rows, tokens, 0

    def row(self) -> Callable[[int, int], None] | None:
        before = self.begun * self.tokens
        self.begun += 1
        if self.progress is None:
            return None
        report = self.progress
        return lambda done, everything: report(before + done * self.tokens // everything, self.rows * self.tokens)


def render_comparison(table: ComparisonTable) -> Table:
    """The comparison as a rich table: a row per scaling, a column per length, the best of a column in bold."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=f"Perplexity on {len(table.documents)} documents, window {table.window:,} tokens")
    drawn.add_column("factors")
    drawn.add_column(f"{_times(table.window, table.window)} short set", justify="right")
    for length in table.lengths:
        drawn.add_column(f"{_times(length, table.window)} ({length:,})", justify="right")
    best = {length: table.best(length) for length in table.lengths}
    for row in table.rows:
        cells = [
            Text(
                perplexity_text(row.perplexity.at(length).perplexity),
                style="bold" if best[length] == row.name else "",
            )
            for length in table.lengths
        ]
        drawn.add_row(Text(row.name), perplexity_text(row.short.at(table.window).perplexity), *cells)
    return drawn


def render_perplexity(result: PerplexityResult) -> list[Table]:
    """Perplexity by length and by span as two rich tables."""
    from rich.table import Table

    lengths = Table(title=f"Perplexity on {len(result.documents)} documents")
    for name in ("tokens", "perplexity", "nats a token", "measured tokens"):
        lengths.add_column(name, justify="right")
    for entry in result.lengths:
        lengths.add_row(f"{entry.length:,}", perplexity_text(entry.perplexity), f"{entry.nll:.4f}", f"{entry.tokens:,}")
    spans = Table(title=f"Within the {result.lengths[-1].length:,} tokens")
    for name in ("span", "perplexity"):
        spans.add_column(name, justify="right")
    for span in result.spans:
        spans.add_row(f"{span.start:,} – {span.end:,}", perplexity_text(span.perplexity))
    return [lengths, spans]


def render_passkey(results: Mapping[str, PasskeyResult]) -> Table:
    """Passkey accuracy as a rich table: a row per set of factors and length, teacher-forced and generated."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title="Passkey retrieval")
    drawn.add_column("factors")
    for name in ("tokens", "trials", "teacher-forced", "generated"):
        drawn.add_column(name, justify="right")
    for factors, result in results.items():
        for length in result.lengths:
            trials = sum(trial.length == length for trial in result.trials)
            shares = [result.accuracy(length, "forced"), result.accuracy(length, "generate")]
            cells = ["–" if share is None else f"{share:.1%}" for share in shares]
            drawn.add_row(Text(factors), f"{length:,}", str(trials), *cells)
    return drawn


def perplexity_text(value: float) -> str:
    """Four significant digits for people: `21.65`, `436.2`, `1.2e+06`."""
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 10_000 else f"{value:.2g}"


def _times(length: int, window: int) -> str:
    return f"{length / window:.4g}×" if window else f"{length:,}"
