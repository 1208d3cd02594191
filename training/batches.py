"""Rows as batches: each a pure function of the seed and its number, so that any process and any resume sees the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from longrope_export.training.data.rows import RowPlan
from longrope_export.training.positions import IGNORED, Example, Positions, present


class Examples(Dataset[Example]):
    """The rows of `plan`, presented as `positions` asks."""

    def __init__(self, plan: RowPlan, positions: Positions) -> None:
        self.plan, self.positions = plan, positions

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Example:
        return present(self.plan.tokens(index), self.positions, self.plan.rng(index))


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """The examples as tensors [B, T]; shorter rows end in tokens of a document of their own, which is not scored."""
    width = max(len(each) for each in examples)
    return {
        "input_ids": _stack([each.input_ids for each in examples], width, 0),
        "labels": _stack([each.labels for each in examples], width, IGNORED),
        "position_ids": _stack([each.position_ids for each in examples], width, 0),
        # Documents are numbered from 0, so the row's length is more than any of them.
        "documents": _stack([each.documents for each in examples], width, width),
        "long": _stack([each.long for each in examples], width, False),
    }


def _stack(rows: Sequence[npt.NDArray[Any]], width: int, fill: int) -> Tensor:
    padded = [np.pad(row, (0, width - len(row)), constant_values=fill) for row in rows]
    return torch.from_numpy(np.stack(padded))
