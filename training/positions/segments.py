"""Training on segmented sequences (arXiv 2310.14633), its variant chunk-α."""

from __future__ import annotations

import numpy as np

from longrope_export.training.positions.example import Presented


def segments(length: int, budget: int, count: int, rng: np.random.Generator) -> Presented:
    """`count` ordered segments without overlap, `budget` tokens together, at their true positions.

    Every placement in the document of `length` tokens is equally likely. Segments are `budget / count` tokens long; the
    first ones take what is left of the division.
    """
    count = min(count, budget)
    sizes = np.full(count, budget // count, dtype=np.int64)
    sizes[: budget % count] += 1
    # Stars and bars: `count` distinct places among segments and gap tokens, of which i belong to earlier segments.
    places = np.sort(rng.choice(length - budget + count, size=count, replace=False))
    gaps = places - np.arange(count)
    indices = np.arange(budget, dtype=np.int64) + np.repeat(gaps, sizes)
    return Presented(indices, indices.copy(), True)
