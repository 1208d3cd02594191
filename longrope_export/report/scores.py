"""Reading the tasks of a result file that give one number at a time: RULER, LongPPL, other harnesses' metrics."""

from __future__ import annotations

from collections.abc import Iterator

from longrope_export.report.fields import Fields, is_object
from longrope_export.report.numbers import MISSING, perplexity_text
from longrope_export.report.results import Score

# Of an entry for one length, the number that the page shows.
_SHARES, _PERPLEXITIES = ("score", "accuracy"), ("longppl", "perplexity")
# What a row says of its run and not of the model.
_NO_SCORES = ("forward_passes", "seconds", "questions", "samples")


def read_scores(tasks: Fields) -> Iterator[Score]:
    """Every number of every task that has no figure of its own; raises `InputFileError` for what is none."""
    for task in tasks.values:
        has_figure = task in ("perplexity", "retention") or (task == "sliding" and "perplexity" not in tasks.values)
        if has_figure or not is_object(tasks.values[task]):
            continue
        rows = (tasks.object(task) or Fields({})).object("rows") or Fields({})
        for name in rows.values:
            yield from _row_scores(task, name, rows.object(name) or Fields({}))


def _row_scores(task: str, method: str, row: Fields) -> Iterator[Score]:
    if not is_object(row.values.get("tasks")):
        yield from _task_scores(task, method, row)
        return
    parts = row.object("tasks") or Fields({})
    for part in parts.values:
        yield from _task_scores(f"{task} {part}", method, parts.object(part) or Fields({}))
    if is_object(row.values.get("average")):
        average = row.object("average") or Fields({})
        for length in average.values:
            if length.isdecimal() and len(length) < 12:
                yield Score(f"{task}, mean of the tasks", method, int(length), _share(average.real(length)))


def _task_scores(task: str, method: str, row: Fields) -> Iterator[Score]:
    by_length = row.values.get("lengths")
    if isinstance(by_length, list) and all(is_object(entry) for entry in by_length):
        for entry in row.objects("lengths"):
            yield from _length_scores(task, method, entry)
    if is_object(row.values.get("metrics")):
        yield from _metrics(task, method, row.object("metrics") or Fields({}))
    for name, value in row.values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and name not in _NO_SCORES:
            yield Score(f"{task}: {name}", method, None, f"{row.real(name):.4g}")


def _length_scores(task: str, method: str, entry: Fields) -> Iterator[Score]:
    name = next((name for name in (*_SHARES, *_PERPLEXITIES) if name in entry.values), None)
    if name is None:
        return
    write = _share if name in _SHARES else perplexity_text
    low, high = entry.real("low"), entry.real("high")
    interval = "" if low is None or high is None else f" ({write(low)}–{write(high)})"
    title = task if name in ("score", task) else f"{task}: {name}"
    yield Score(title, method, entry.integer("length"), f"{write(entry.real(name))}{interval}")


def _metrics(task: str, method: str, metrics: Fields) -> Iterator[Score]:
    for name in metrics.values:
        metric = metrics.object(name) or Fields({})
        value, error = metric.real("value"), metric.real("stderr")
        text = MISSING if value is None else f"{value:.4g}"
        yield Score(f"{task}: {name}", method, None, text if error is None else f"{text} ± {error:.2g}")


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.1%}" if 0.0 <= value <= 1.0 else f"{value:.4g}"
