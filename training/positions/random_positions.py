"""RandPos (Ruoss et al. 2023): a baseline whose positions are random."""

from __future__ import annotations

import numpy as np

from longrope_export.training.positions.example import Presented


def random_positions(budget: int, target: int, rng: np.random.Generator) -> Presented:
    """The first `budget` tokens at sorted positions drawn without replacement from 0…target-1."""
    positions = np.sort(rng.choice(target, size=budget, replace=False)).astype(np.int64)
    return Presented(np.arange(budget, dtype=np.int64), positions, True)
