"""Reading the result file of `longrope eval` (format longrope-eval/1) into what the page shows, every type checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from longrope_export.errors import InputFileError, ScalingError
from longrope_export.report.fields import Fields, is_object
from longrope_export.report.results import Evaluation, Grid, Method, Point, Retention, Span
from longrope_export.report.scores import read_scores
from longrope_export.scaling import RopeScaling

FORMAT = "longrope-eval/1"
# Of a grid, so that the product of both sides is bounded.
MOST_LENGTHS, MOST_DEPTHS = 128, 2048
MOST_ROWS, MOST_POINTS, MOST_GRIDS, MOST_SCORES = 64, 256, 256, 2000
_PERPLEXITIES = ("perplexity", "sliding")
_WAYS = {"forced": "teacher-forced"}
_ABOUT = (
    "runtime", "dtype", "threads", "seed", "switch", "context", "position_offset", "prefill_chunk", "seconds",
)  # fmt: skip


def read_evaluation(values: Mapping[str, Any], name: str) -> Evaluation:
    """The evaluation in a result's JSON object; raises `InputFileError`, naming the place, for what is none."""
    result = Fields(values)
    if result.text("format") != FORMAT:
        raise InputFileError(f"its format is {str(values.get('format'))[:40]!r}; this version reads {FORMAT!r}")
    tasks = result.object("tasks") or Fields({}, "tasks")
    rows = list(result.objects("rows"))
    notes = [str(note)[:500] for note in result.list("notes")[:50]]
    if values.get("partial") is True:
        notes.append("This evaluation is not complete.")
    if len(rows) > MOST_ROWS:
        notes.append(f"{len(rows) - MOST_ROWS} more rows are not shown.")
    return Evaluation(
        name=name,
        window=result.integer("window"),
        switch=_switch(result),
        methods=tuple(_method(tasks, row) for row in rows[:MOST_ROWS]),
        grids=tuple(itertools.islice(_grids(tasks), MOST_GRIDS)),
        scores=tuple(itertools.islice(read_scores(tasks), MOST_SCORES)),
        records=tuple(_records(rows[:MOST_ROWS])),
        command=result.text("command"),
        about=tuple(_about(result)),
        versions=versions(result),
        notes=tuple(notes),
    )


def versions(result: Fields) -> dict[str, str]:
    """The packages' versions by name, as texts."""
    found = result.object("versions")
    return {} if found is None else {name: found.text(name) or "" for name in found.values}


def _switch(result: Fields) -> int | None:
    """Where the first record that has two sets of factors turns to its long ones."""
    for row in result.objects("rows"):
        scaling = row.object("scaling")
        if scaling is not None and scaling.values.get("long_factor") != scaling.values.get("short_factor"):
            return scaling.integer("original_max_position_embeddings")
    return None


def _records(rows: list[Fields]) -> Iterator[tuple[str, RopeScaling]]:
    for row in rows:
        scaling = row.object("scaling")
        if scaling is not None:
            yield row.text("name") or "", _record(scaling)


def _record(scaling: Fields) -> RopeScaling:
    try:
        return RopeScaling.from_dict(scaling.values)
    except ScalingError as error:
        raise InputFileError(f"{scaling.where}: {error}") from None


def _row(tasks: Fields, task: str, row: str) -> Fields | None:
    found = tasks.object(task)
    rows = None if found is None else found.object("rows")
    return None if rows is None else rows.object(row)


def _method(tasks: Fields, row: Fields) -> Method:
    name = row.text("name") or ""
    # The truncated protocol is the one of the published tables; the sliding one stands in where it ran alone.
    task = next((task for task in _PERPLEXITIES if _row(tasks, task, name)), "perplexity")
    found = _row(tasks, task, name) or Fields({})
    return Method(
        name,
        points=tuple(itertools.islice(_points(found), MOST_POINTS)),
        spans=tuple(itertools.islice(_spans(found), MOST_POINTS)),
        retention=tuple(_retention(tasks, name)),
        own=row.text("method") == "record",
    )


def _points(row: Fields) -> Iterator[Point]:
    for entry in row.objects("lengths"):
        length = entry.integer("length")
        if length:
            yield Point(length, _perplexity(entry), entry.real("low"), entry.real("high"), _sure(entry))


def _sure(entry: Fields) -> str:
    difference = entry.object("difference") or Fields({})
    low, high = difference.real("low"), difference.real("high")
    if low is None or high is None or low <= 0.0 <= high:
        return ""
    return "↓" if high < 0.0 else "↑"


def _spans(row: Fields) -> Iterator[Span]:
    for entry in row.objects("spans"):
        start, end = entry.integer("start"), entry.integer("end")
        if start is not None and end is not None:
            yield Span(start, end, _perplexity(entry), entry.real("low"), entry.real("high"))


def _perplexity(entry: Fields) -> float | None:
    value = entry.real("perplexity")
    if value is not None and value <= 0.0:
        raise InputFileError(f"{entry.where}.perplexity is {value:g}; it must be greater than 0")
    return value


def _retention(tasks: Fields, name: str) -> Iterator[Retention]:
    row = _row(tasks, "retention", name) or Fields({})
    for factors in ("short", "long"):
        found = row.object(factors)
        if found is not None:
            yield Retention(
                factors, _perplexity(found), found.real("ratio"), found.real("low"), found.real("high")
            )  # fmt: skip


def _grids(tasks: Fields) -> Iterator[Grid]:
    """Every grid of lengths and depths in any task, whatever its row calls it."""
    for task in tasks.values:
        rows = (tasks.object(task) or Fields({})).object("rows") if is_object(tasks.values[task]) else None
        for name in rows.values if rows else ():
            row = rows.object(name) if rows else None
            for mode, value in (row.values if row else {}).items():
                if row and is_object(value) and {"lengths", "depths", "correct", "total"} <= value.keys():
                    title = f"{task}, {_WAYS.get(mode, mode)}"
                    yield _grid(title, name, Fields(value, f"{row.where}.{mode}"))


def _grid(task: str, method: str, values: Fields) -> Grid:
    lengths = [int(each) for each in values.reals("lengths") if each is not None]
    depths = [each for each in values.reals("depths") if each is not None]
    if not all(0.0 <= depth <= 1.0 for depth in depths) or not all(length > 0 for length in lengths):
        raise InputFileError(f"{values.where} has lengths or depths that are none: a depth is from 0 to 1")
    correct, total = (_counts(values, name, len(lengths), len(depths)) for name in ("correct", "total"))
    if any(c > t for one, all_ in zip(correct, total) for c, t in zip(one, all_)):
        raise InputFileError(f"{values.where} has more right answers than trials")
    return Grid(task, method, tuple(lengths), tuple(depths), correct, total)


def _counts(values: Fields, name: str, rows: int, columns: int) -> tuple[tuple[int, ...], ...]:
    found = values.list(name)
    shaped = len(found) == rows <= MOST_LENGTHS and columns <= MOST_DEPTHS
    if not shaped or any(not isinstance(row, list) or len(row) != columns for row in found):
        raise InputFileError(f"{values.where}.{name} must have a row for each length and a value for each depth")
    counts = tuple(tuple(_count(value) for value in row) for row in found)
    if any(value < 0 for row in counts for value in row):
        raise InputFileError(f"{values.where}.{name} must hold counts")
    return counts


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value < 10**9 else -1


def _about(result: Fields) -> Iterator[tuple[str, str]]:
    for model in result.objects("models"):
        parts = [model.text("path"), model.text("kind"), model.text("fingerprint")]
        parameters = model.integer("parameters")
        counted = [] if parameters is None else [f"{parameters:,} parameters"]
        yield f"model {model.text('name') or ''}".strip(), ", ".join([each for each in parts if each] + counted)
    data = result.object("data")
    if data is not None:
        documents = [entry.text("name") or "" for entry in data.objects("documents")]
        yield "documents", f"{len(documents)}: {', '.join(documents[:20])}{' …' if len(documents) > 20 else ''}"
        yield "SHA-256 of the tokens", data.text("sha256") or "–"
    for name in _ABOUT:
        value = result.values.get(name)
        if value is not None:
            yield name.replace("_", " "), str(value)[:200]
    options = result.object("options")
    if options is not None and options.values:
        yield "options", ", ".join(f"{name} = {str(value)[:80]}" for name, value in options.values.items())
