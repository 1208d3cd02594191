"""A row's documents become an example."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from longrope_export.errors import LongRopeError
from longrope_export.training.positions.example import Example, example
from longrope_export.training.positions.schemes import SCHEMES, Positions


def present(tokens: Sequence[npt.NDArray[np.integer]], settings: Positions, rng: np.random.Generator) -> Example:
    """The example of a row whose documents are `tokens`, in order; a pure function of them and of `rng`'s state.

    Every document is presented by itself: its positions start anew and chunks, segments and factors are its own. A row
    of more than `settings.tokens` tokens is cut to that many, each document in proportion. Raises `LongRopeError` for a
    row without tokens.
    """
    documents = [np.asarray(ids, dtype=np.int64) for ids in tokens]
    if not documents or min(map(len, documents)) == 0:
        raise LongRopeError("a row needs documents of at least one token")
    scheme = SCHEMES[settings.scheme]
    budgets = _budgets([len(ids) for ids in documents], settings.tokens)
    kept = [(ids, budget) for ids, budget in zip(documents, budgets) if budget]
    parts = [scheme(len(ids), budget, settings, rng) for ids, budget in kept]
    return example([ids for ids, _ in kept], parts)


def _budgets(lengths: list[int], tokens: int) -> list[int]:
    total = sum(lengths)
    if total <= tokens:
        return lengths
    # Rounded cumulatively, so that the budgets add up to `tokens` and none exceeds its document.
    ends = [0, *(int(end) * tokens // total for end in np.cumsum(lengths))]
    return [after - before for before, after in pairwise(ends)]
