"""Perplexity on held-out documents, at the window L with the short set and at the target L' with the long one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from longrope_export.training.positions import IGNORED
from longrope_export.training.rotation import TrainingRotation


@dataclass(frozen=True)
class Measure:
    """Perplexity on the first `length` tokens of each row with the long or the short set; `name` is its name in logs."""

    name: str
    length: int
    long: bool


class HeldOut:
    """Rows (token ids, each as long as the longest measure) and what is measured on them.

    `full_attention(model)` is a context in which the model attends as it will after training.
    """

    def __init__(
        self,
        rows: Sequence[npt.NDArray[np.int64]],
        measures: Sequence[Measure],
        full_attention: Callable[[Any], AbstractContextManager[None]] = lambda model: nullcontext(),
    ) -> None:
        self.rows, self.measures, self.full_attention = list(rows), tuple(measures), full_attention

    def __len__(self) -> int:
        return len(self.rows)

    @torch.no_grad()
    def measure(self, model: Any, rotation: TrainingRotation, accelerator: Any) -> dict[str, float]:
        """Perplexity exp(ΣNLL/Σtokens) by `eval_<name>`; the rows are split over the processes."""
        with self.full_attention(model):
            return {f"eval_{each.name}": self._perplexity(model, rotation, accelerator, each) for each in self.measures}

    def _perplexity(self, model: Any, rotation: TrainingRotation, accelerator: Any, measure: Measure) -> float:
        rank, processes = accelerator.process_index, accelerator.num_processes
        total = torch.zeros(2, dtype=torch.float64)  # on the CPU: not every device has the type
        rotation.choose_all(long=measure.long)
        # Every process makes as many forwards as the others, because FSDP's are collective: some count for nothing.
        for start in range(0, len(self.rows), processes):
            index = start + rank
            row = torch.from_numpy(self.rows[min(index, len(self.rows) - 1)][: measure.length]).to(accelerator.device)
            found = self._sums(model, row)
            if index < len(self.rows):
                total += found
        nll, count = (accelerator.reduce(total.to(accelerator.device)) if processes > 1 else total).tolist()
        return math.exp(min(nll / count, 700.0))

    def _sums(self, model: Any, row: torch.Tensor) -> torch.Tensor:
        labels = torch.cat([row[1:], row.new_full((1,), IGNORED)])
        positions = torch.arange(len(row), device=row.device)
        outputs = model(input_ids=row[None], position_ids=positions[None], labels=labels[None], use_cache=False)
        return torch.tensor([outputs.total.item(), outputs.count.item()], dtype=torch.float64)
