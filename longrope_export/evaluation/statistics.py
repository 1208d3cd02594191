"""Intervals by document bootstrap: how far a figure would move with other documents of the same kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

DRAWS = 2_000
LEVEL = 0.95
# exp of this is the largest perplexity that is written: JSON has no infinity.
_LARGEST_NLL = 690.0

Values = Sequence[float] | npt.NDArray[np.floating[Any]]


def exp(nll: float) -> float:
    """e^nll, at most 1e299."""
    return math.exp(min(nll, _LARGEST_NLL))


def weighted_mean(sums: Values, counts: Values) -> float:
    """Σ sums / Σ counts: never a mean of means."""
    return float(np.sum(sums, dtype=np.float64) / np.sum(counts, dtype=np.float64))


def interval(
    sums: Values, counts: Values, shown: Callable[[float], float] = float
) -> tuple[float | None, float | None]:
    """95 % interval of Σ sums / Σ counts over documents drawn with replacement, each end as `shown(end)`.

    (None, None) for fewer than two documents, which say nothing about others. The draws are the same each time.
    """
    above, below = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if len(above) < 2:
        return None, None
    drawn = np.random.default_rng(0).integers(len(above), size=(DRAWS, len(above)))
    totals = below[drawn].sum(axis=1)
    if not totals.all():
        return None, None
    low, high = np.quantile(above[drawn].sum(axis=1) / totals, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return shown(float(low)), shown(float(high))


def perplexity_entry(sums: Values, counts: Values) -> dict[str, Any]:
    """`perplexity`, its interval `low`, `high`, `nll` and `tokens` from each document's ΣNLL and tokens."""
    nll = weighted_mean(sums, counts)
    low, high = interval(sums, counts, exp)
    return {"perplexity": exp(nll), "low": low, "high": high, "nll": nll, "tokens": int(np.sum(counts))}


def difference_entry(sums: Values, reference: Values, counts: Values) -> dict[str, Any]:
    """Paired by document: mean `nll` above the reference's with its interval, and the perplexities' `ratio`."""
    differences = np.asarray(sums, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    nll = weighted_mean(differences, counts)
    low, high = interval(differences, counts)
    return {"nll": nll, "low": low, "high": high, "ratio": exp(nll)}


def ratio_entry(sums: Values, reference: Values, counts: Values) -> dict[str, Any]:
    """`perplexity`, and its `ratio` to the reference's with the interval of the ratio, paired by document."""
    found = difference_entry(sums, reference, counts)
    low, high = (None if end is None else exp(end) for end in (found["low"], found["high"]))
    return {"perplexity": exp(weighted_mean(sums, counts)), "ratio": found["ratio"], "low": low, "high": high}
