"""One row as the model sees it, and the part of it that a document contributes."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

IGNORED = -100
"""Label of a position that is not scored (PyTorch's `ignore_index`)."""


@dataclass(frozen=True)
class Presented:
    """What one document gives to a row: `indices` int64 [n] of its tokens, ascending, their `positions` int64 [n],
    and whether it turns with the long factors.
    """

    indices: Ints
    positions: Ints
    long: bool


@dataclass(frozen=True)
class Example:
    """One row, all arrays [T].

    `input_ids` int64; `labels` int64: the token that each position predicts, shifted already, `IGNORED` where none is
    scored; `position_ids` int64; `documents` int64: 0, 1, 2 … in row order; `long` bool: true where the long factors
    apply.
    """

    input_ids: Ints
    labels: Ints
    position_ids: Ints
    documents: Ints
    long: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        shapes = {getattr(self, field.name).shape for field in fields(self)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise ValueError(f"the arrays of an example have the shapes {sorted(shapes)}; all must be [T]")

    def __len__(self) -> int:
        """Tokens of the row, T."""
        return len(self.input_ids)


def example(tokens: list[Ints], parts: list[Presented]) -> Example:
    """The row of `parts`, one for each document of `tokens`, in order."""
    sizes = [len(part.indices) for part in parts]
    return Example(
        input_ids=np.concatenate([ids[part.indices] for ids, part in zip(tokens, parts)]),
        labels=np.concatenate([_labels(ids, part.indices) for ids, part in zip(tokens, parts)]),
        position_ids=np.concatenate([part.positions for part in parts]),
        documents=np.repeat(np.arange(len(parts), dtype=np.int64), sizes),
        long=np.repeat(np.array([part.long for part in parts]), sizes),
    )


def _labels(ids: Ints, indices: Ints) -> Ints:
    # Across a cut in the text the next token of the row is not what follows: scoring it would teach a jump.
    labels = np.full(len(indices), IGNORED, dtype=np.int64)
    follows = np.flatnonzero(np.diff(indices) == 1)
    labels[follows] = ids[indices[follows + 1]]
    return labels
