"""Forward passes over the documents that several tasks share: one for each set of factors, at the longest length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from longrope_export.errors import NumericalError
from longrope_export.evaluation.protocol import Engine, Request, Side, Unit, Value, Wanted
from longrope_export.evaluation.rows import ModelRow


@dataclass(frozen=True)
class DocumentPass:
    """A forward pass over the first `length` tokens with the set called `label`; `side` brings that set about."""

    length: int
    label: str
    side: Side
    offset: int

    def key(self, document: int) -> str:
        """The unit's key; two rows have it in common only if they have the same document, length and set."""
        start = f" from {self.offset}" if self.offset else ""
        return f"losses {self.length} {self.label}{start} document {document}"


def plan_passes(request: Request, row: ModelRow) -> dict[Wanted, DocumentPass]:
    """The pass that serves each wanted length: the longest one with an equal set, whose beginning has the same losses."""
    sides: dict[str, dict[int, Side]] = {}
    labels = {entry: row.factor_set(entry.length + request.offset, entry.side).label for entry in request.wanted}
    for entry, label in labels.items():
        sides.setdefault(label, {}).setdefault(entry.length, entry.side)
    longest = {label: max(lengths) for label, lengths in sides.items()}
    return {
        entry: DocumentPass(longest[label], label, sides[label][longest[label]], request.offset)
        for entry, label in labels.items()
    }


def pass_units(request: Request, row: ModelRow, wanted: Sequence[Wanted]) -> list[Unit]:
    """One unit for every document and pass that serves `wanted`, in the order of the lengths."""
    plan = plan_passes(request, row)
    passes = dict.fromkeys(plan[entry] for entry in wanted)
    return [
        Unit(
            key=entry.key(index),
            length=entry.length + entry.offset,
            cost=entry.length,
            run=partial(_losses, token_ids=document.token_ids[: entry.length], name=document.name, offset=entry.offset),
            side=entry.side,
        )
        for entry in sorted(passes, key=lambda entry: (entry.length, entry.label))
        for index, document in enumerate(request.documents)
    ]


def _losses(engine: Engine, *, token_ids: npt.NDArray[np.int64], name: str, offset: int) -> Value:
    try:
        return {"losses": engine.losses(token_ids, offset=offset)}
    except NumericalError as error:
        raise NumericalError(f"{name}: {error}") from None


def document_losses(
    request: Request, row: ModelRow, wanted: Wanted, values: Mapping[str, Value]
) -> list[npt.NDArray[np.float32]]:
    """The losses [length - 1] of every document's tokens 2…length that `wanted` asks for."""
    entry = plan_passes(request, row)[wanted]
    return [values[entry.key(index)]["losses"][: wanted.length - 1] for index in range(len(request.documents))]
