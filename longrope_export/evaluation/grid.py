"""Right answers as ratios with their counts and Wilson intervals, over lengths × depths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

_NORMAL_QUANTILE = 1.959963984540054  # of 97.5 %
WAYS = {"forced": "teacher-forced", "generated": "generated"}


def wilson(right: float, total: int) -> tuple[float, float]:
    """95 % score interval of a ratio (Wilson 1927), as shares; (0, 1) without trials.

    `right` may be a sum of scores between 0 and 1: their variance is never above that of right and wrong, so that the
    interval is then too wide rather than too narrow.
    """
    if not total:
        return 0.0, 1.0
    share, spread = right / total, _NORMAL_QUANTILE**2 / total
    middle = share + spread / 2
    width = math.sqrt(spread * share * (1 - share) + spread**2 / 4)
    return max(0.0, (middle - width) / (1 + spread)), min(1.0, (middle + width) / (1 + spread))


def ratio_entry(right: float, total: int) -> dict[str, Any]:
    """`score` (None without trials), `correct`, `total` and the interval `low`, `high`."""
    low, high = wilson(right, total)
    return {"score": right / total if total else None, "correct": right, "total": total, "low": low, "high": high}


def grid(trials: Sequence[Mapping[str, Any]], way: str) -> dict[str, Any] | None:
    """Counts of trials ("length", "depth", and `way`: right or not) by length (rows) and depth (columns).

    None when no trial was scored in this way.
    """
    scored = [trial for trial in trials if trial[way] is not None]
    if not scored:
        return None
    lengths = sorted({trial["length"] for trial in scored})
    depths = sorted({trial["depth"] for trial in scored})
    cells = [[[t[way] for t in scored if (t["length"], t["depth"]) == (a, b)] for b in depths] for a in lengths]
    right = [[sum(cell) for cell in row] for row in cells]
    total = [[len(cell) for cell in row] for row in cells]
    return {
        "lengths": lengths,
        "depths": depths,
        "correct": right,
        "total": total,
        "accuracy": {str(length): sum(r) / sum(n) for length, r, n in zip(lengths, right, total)},
        "intervals": {str(length): list(wilson(sum(r), sum(n))) for length, r, n in zip(lengths, right, total)},
    }


def ratio_text(right: float, total: int) -> str:
    """For people: `80.0% (8/10; 49–94%)`."""
    low, high = wilson(right, total)
    return f"{right / total:.1%} ({right:.4g}/{total}; {low:.0%}–{high:.0%})" if total else "–"


def grid_table(title: str, result: Mapping[str, Any]) -> Table:
    """Shares of right answers as a rich table: a line per row and length."""
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title)
    drawn.add_column("factors")
    drawn.add_column("tokens", justify="right")
    for shown in WAYS.values():
        drawn.add_column(shown, justify="right")
    for name, row in result["rows"].items():
        for length in row["lengths"]:
            drawn.add_row(Text(name), f"{length:,}", *(_cell(row[way], length) for way in WAYS))
    return drawn


def _cell(found: Mapping[str, Any] | None, length: int) -> str:
    if found is None:
        return "–"
    at = found["lengths"].index(length)
    return ratio_text(sum(found["correct"][at]), sum(found["total"][at]))


def grid_measures(result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """CSV lines: the share by row, way and length, then by depth."""
    for name, row in result["rows"].items():
        for way, shown in WAYS.items():
            for at, length in enumerate(row[way]["lengths"] if row[way] else ()):
                right, total = row[way]["correct"][at], row[way]["total"][at]
                yield _measure(name, shown, length, sum(right), sum(total))
                for depth, r, n in zip(row[way]["depths"], right, total):
                    if n:
                        yield {**_measure(name, shown, length, r, n), "depth": depth}


def _measure(row: str, way: str, length: int, right: int, total: int) -> dict[str, Any]:
    low, high = wilson(right, total)
    return {"row": row, "metric": f"accuracy, {way}", "value": right / total, "low": low, "high": high,
            "count": total, "length": length}  # fmt: skip
