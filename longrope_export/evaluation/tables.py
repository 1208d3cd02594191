"""Several scalings on one resident model, the same documents and lengths for all: the before/after table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from longrope_export.evaluation.documents import Row, data_hash
from longrope_export.evaluation.passes import fixed_set, original_window
from longrope_export.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from longrope_export.report.numbers import perplexity_text
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


def length_table(title: str, result: Mapping[str, Any]) -> Table:
    """Perplexity by row and length with intervals; what is surely better than the first row is marked."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title, caption=_CAPTION if _has_intervals(result) else None)
    drawn.add_column("factors", overflow="fold")
    for entry in next(iter(result["rows"].values()))["lengths"]:
        drawn.add_column(f"{_times(entry['length'], result['window'])} ({entry['length']:,})", justify="right")
    best = _best(result)
    for name, row in result["rows"].items():
        cells = [
            Text(_length_cell(entry), style="bold" if best.get(entry["length"]) == name else "")
            for entry in row["lengths"]
        ]
        drawn.add_row(Text(name), *cells)
    return drawn


_CAPTION = "in brackets 95 % intervals over documents; ↓ ↑: surely below, above the first row, paired by document"


def _has_intervals(result: Mapping[str, Any]) -> bool:
    return any(entry["low"] is not None for row in result["rows"].values() for entry in row["lengths"])


def _best(result: Mapping[str, Any]) -> dict[int, str]:
    """The row with the lowest perplexity by length, where there are several."""
    lowest: dict[int, tuple[float, str]] = {}
    for name, row in result["rows"].items():
        for entry in row["lengths"]:
            found = lowest.get(entry["length"])
            if found is None or entry["perplexity"] < found[0]:
                lowest[entry["length"]] = (entry["perplexity"], name)
    return {length: name for length, (_, name) in lowest.items()} if len(result["rows"]) > 1 else {}


def _length_cell(entry: Mapping[str, Any]) -> str:
    text = perplexity_text(entry["perplexity"])
    if entry["low"] is not None:
        text += f" [{perplexity_text(entry['low'])}, {perplexity_text(entry['high'])}]"
    return text + _direction(entry["difference"])


def _direction(difference: Mapping[str, Any] | None) -> str:
    if difference is None or difference["low"] is None or difference["low"] <= 0.0 <= difference["high"]:
        return ""
    return " ↓" if difference["high"] < 0.0 else " ↑"


def span_table(result: Mapping[str, Any]) -> Table:
    """Perplexity by span of positions of the longest length, a column a row of the result."""
    from rich.table import Table

    drawn = Table(title=f"Within the {max(result['lengths']):,} tokens")
    drawn.add_column("span", justify="right")
    for name in result["rows"]:
        drawn.add_column(name, justify="right", overflow="fold")
    for spans in zip(*(row["spans"] for row in result["rows"].values())):
        cells = [perplexity_text(span["perplexity"]) for span in spans]
        drawn.add_row(f"{spans[0]['start']:,} – {spans[0]['end']:,}", *cells)
    return drawn


def retention_table(result: Mapping[str, Any]) -> Table:
    """Ratios at the window with the short and the long factors; above 1 is worse than the unmodified model."""
    from rich.table import Table
    from rich.text import Text

    title = f"The window of {result['window']:,} tokens against {result['reference']}"
    drawn = Table(title=f"{title} ({perplexity_text(result['perplexity'])})")
    drawn.add_column("factors", overflow="fold")
    for name in ("short factors", "long factors"):
        drawn.add_column(name, justify="right")
    for name, row in result["rows"].items():
        drawn.add_row(Text(name), *(_ratio_cell(row[which]) for which in ("short", "long")))
    return drawn


def _ratio_cell(entry: Mapping[str, Any]) -> str:
    text = f"{perplexity_text(entry['perplexity'])} = {entry['ratio']:.3f} ×"
    return text if entry["low"] is None else f"{text} [{entry['low']:.3f}, {entry['high']:.3f}]"


def longppl_table(result: Mapping[str, Any]) -> Table:
    """LongPPL by row and length, with the number of key tokens."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=f"LongPPL, short context {result['context']:,}, key tokens of {result['evaluator']}")
    drawn.add_column("factors", overflow="fold")
    for entry in next(iter(result["rows"].values()))["lengths"]:
        drawn.add_column(f"{entry['length']:,}", justify="right")
    for name, row in result["rows"].items():
        drawn.add_row(Text(name), *(_longppl_cell(entry) for entry in row["lengths"]))
    return drawn


def _longppl_cell(entry: Mapping[str, Any]) -> str:
    if entry["longppl"] is None:
        return "no key tokens"
    return f"{perplexity_text(entry['longppl'])} ({entry['key_tokens']:,} of {entry['tokens']:,} tokens)"


def _times(length: int, window: int) -> str:
    return f"{length / window:.4g}×" if window else f"{length:,}"
