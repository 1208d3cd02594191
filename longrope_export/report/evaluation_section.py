"""The part of the page that one evaluation fills: perplexity, retention, what was found, and other scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.etree.ElementTree import Element

from longrope_export.report.elements import Child, bullets, element, folded, table
from longrope_export.report.figures import Gallery
from longrope_export.report.grid_plots import grid_picture
from longrope_export.report.numbers import (
    MISSING,
    change_text,
    interval_text,
    perplexity_text,
    ratio_text,
    share_text,
    tokens_text,
)
from longrope_export.report.perplexity_plots import length_picture, position_picture
from longrope_export.report.results import Evaluation, Grid, Method, Point, Retention

MOST_TASKS, MOST_DEPTHS = 12, 200


def evaluation_section(evaluation: Evaluation, gallery: Gallery, title: str) -> Element:
    """Everything that was measured, figures beside tables."""
    parts: list[Element] = [element("h2", title)]
    if evaluation.notes:
        parts.append(bullets(evaluation.notes))
    for children in (_perplexity, _retention, _found, _scores):
        parts += children(evaluation, gallery)
    return element("section", *parts)


def main_table(evaluation: Evaluation) -> list[list[str]]:
    """Perplexity by length as text cells, a header row first: the table of the page and of a model card."""
    lengths, window = evaluation.lengths, evaluation.window
    short = any(_kept(method, "short") for method in evaluation.methods)
    header = ["factors", *(["1× short set"] if short else []), *(_length_head(length, window) for length in lengths)]
    rows = []
    for method in evaluation.methods:
        kept = _kept(method, "short")
        extra = [perplexity_text(kept.perplexity if kept else None)] if short else []
        rows.append([method.name, *extra, *(perplexity_text(_value(method, length)) for length in lengths)])
    return [header, *rows] if lengths else []


def best_rows(evaluation: Evaluation) -> list[int | None]:
    """For each length, the number of the method with the lowest perplexity."""
    return [
        min(
            (number for number, method in enumerate(evaluation.methods) if _value(method, length) is not None),
            key=lambda number: _value(evaluation.methods[number], length) or 0.0,
            default=None,
        )
        for length in evaluation.lengths
    ]


def _perplexity(evaluation: Evaluation, gallery: Gallery) -> Iterator[Element]:
    lengths = evaluation.lengths
    if not lengths:
        return
    yield element("h3", "Perplexity")
    yield from gallery.figure(length_picture(evaluation, gallery.name("perplexity-by-length"), gallery.looks))
    header = ["factors", *(_length_head(length, evaluation.window) for length in lengths)]
    rows = [[method.name, *(_point_cell(method.at(length)) for length in lengths)] for method in evaluation.methods]
    caption = (
        "Perplexity by length of the text; intervals are 95%, the best of a length is bold; ↓ ↑: surely below, above the "
        "first row, paired by document"
    )
    yield table(caption, header, rows, best_rows(evaluation))
    yield from gallery.figure(position_picture(evaluation, gallery.name("perplexity-by-position"), gallery.looks))
    yield from _span_table(evaluation)


def _span_table(evaluation: Evaluation) -> Iterator[Element]:
    spans = sorted({(span.start, span.end) for method in evaluation.methods for span in method.spans})[:64]
    if not spans:
        return
    header = ["factors", *(f"{start:,}–{end:,}" for start, end in spans)]
    rows = []
    for method in evaluation.methods:
        known = {(span.start, span.end): span.perplexity for span in method.spans}
        rows.append([method.name, *(perplexity_text(known.get(span)) for span in spans)])
    yield folded("Perplexity by position as a table", table("Perplexity of the tokens at positions", header, rows))


def _retention(evaluation: Evaluation, gallery: Gallery) -> Iterator[Element]:
    methods = [method for method in evaluation.methods if method.retention]
    if not methods:
        return
    length = "" if evaluation.window is None else f" of {evaluation.window:,} tokens"
    yield element("h3", "What is kept at the old length")
    yield element(
        "p",
        f"Perplexity inside the original window{length}, against the unmodified model's: above 0% is worse. A runtime "
        "that decides by its context (llama.cpp with a large one, vLLM, mlx-lm) applies the long factors to short "
        "prompts too.",
    )
    header = ["factors", "short set", "against unmodified", "long set", "against unmodified"]
    rows = [[method.name, *_kept_cells(method, "short"), *_kept_cells(method, "long")] for method in methods]
    yield table("Short-window retention", header, rows)


def _kept_cells(method: Method, factors: str) -> list[Child]:
    kept = _kept(method, factors)
    if kept is None:
        return [MISSING, MISSING]
    interval = "" if kept.low is None or kept.high is None else f"{change_text(kept.low)} … {change_text(kept.high)}"
    return [perplexity_text(kept.perplexity), _with_interval(change_text(kept.ratio), interval)]


def _found(evaluation: Evaluation, gallery: Gallery) -> Iterator[Element]:
    tasks = list(dict.fromkeys(grid.task for grid in evaluation.grids))
    if tasks:
        yield element("h3", "Passkeys and needles")
    for task in tasks[:MOST_TASKS]:
        grids = [grid for grid in evaluation.grids if grid.task == task]
        yield element("h4", task)
        yield from gallery.figure(grid_picture(task, grids, evaluation.window, gallery.name(task)))
        yield _grid_table(task, grids)
        yield folded(f"By depth: {task}", *(_depth_table(grid) for grid in grids))


def _grid_table(task: str, grids: Sequence[Grid]) -> Element:
    lengths = sorted({length for grid in grids for length in grid.lengths})
    rows = []
    for grid in grids:
        shares = {length: grid.overall(row) for row, length in enumerate(grid.lengths)}
        tried = sum(map(sum, grid.total))
        rows.append([grid.method, *(share_text(shares.get(length)) for length in lengths), f"{tried:,}"])
    header = ["factors", *(tokens_text(length) for length in lengths), "trials"]
    return table(f"Share found by length: {task}", header, rows)


def _depth_table(grid: Grid) -> Element:
    header = ["depth", *(tokens_text(length) for length in grid.lengths)]
    rows = [
        [f"{depth:.1%}", *(f"{grid.correct[row][at]} of {grid.total[row][at]}" for row in range(len(grid.lengths)))]
        for at, depth in enumerate(grid.depths[:MOST_DEPTHS])
    ]
    return table(f"Found by depth and length: {grid.method}", header, rows)


def _scores(evaluation: Evaluation, gallery: Gallery) -> Iterator[Element]:
    if not evaluation.scores:
        return
    yield element("h3", "Other tasks")
    lengths = sorted({score.length for score in evaluation.scores if score.length is not None})
    alone = any(score.length is None for score in evaluation.scores)
    order = {score.task: place for place, score in reversed(list(enumerate(evaluation.scores)))}
    rows: dict[tuple[str, str], dict[int | None, str]] = {}
    for score in sorted(evaluation.scores, key=lambda score: order[score.task]):
        rows.setdefault((score.task, score.method), {})[score.length] = score.value
    columns: list[int | None] = [*lengths, *([None] if alone else [])]
    header = ["task", "factors", *("all" if column is None else tokens_text(column) for column in columns)]
    cells = [
        [task, method, *(found.get(column, MISSING) for column in columns)] for (task, method), found in rows.items()
    ]
    yield table("Scores by task and length", header, cells)


def _point_cell(point: Point | None) -> Child:
    if point is None:
        return MISSING
    value = f"{perplexity_text(point.perplexity)} {point.sure}".rstrip()
    return _with_interval(value, interval_text(point.low, point.high))


def _with_interval(value: str, interval: str) -> Child:
    return element("span", value, element("small", f" {interval}")) if interval else value


def _length_head(length: int, window: int | None) -> str:
    ratio = ratio_text(length, window)
    return f"{tokens_text(length)} ({ratio})" if ratio else tokens_text(length)


def _value(method: Method, length: int) -> float | None:
    point = method.at(length)
    return None if point is None else point.perplexity


def _kept(method: Method, factors: str) -> Retention | None:
    return next((kept for kept in method.retention if kept.factors == factors), None)
