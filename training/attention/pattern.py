"""What the attention of a forward has to know: where documents end, and how long a group is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from longrope_export.errors import LongRopeError

Shifts = Literal["fixed", "flow"]


@dataclass(frozen=True)
class Pattern:
    """Given to `model(..., longrope_pattern=...)`; it travels down to the attention function, recomputation included.

    `rows` holds each row's document lengths, in order, padding being a document like any other; `group` is the number
    of tokens of a group (S2-Attn) or chunk (SCCA); `shifts` how SCCA shifts its heads. Hashable, without tensors.
    """

    rows: tuple[tuple[int, ...], ...]
    group: int
    shifts: Shifts = "fixed"

    def __post_init__(self) -> None:
        totals = {sum(row) for row in self.rows}
        if len(totals) != 1 or min(min(row, default=0) for row in self.rows) < 1:
            raise ValueError(
                f"rows of {sorted(totals)} tokens: all rows need the same number, in documents of 1 or more"
            )
        if self.group < 2 or self.shifts not in get_args(Shifts):
            raise LongRopeError(
                f"a group of {self.group} tokens with {self.shifts!r} shifts: groups need at least 2 tokens, and shifts "
                f"are {' or '.join(get_args(Shifts))}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a row, T."""
        return sum(self.rows[0])

    @classmethod
    def of(cls, documents: Sequence[Any], *, group_share: float = 0.25, shifts: Shifts = "fixed") -> Pattern:
        """The pattern of rows whose documents are numbered as in `Example.documents`: integers [B, T], or B times [T].

        A new document begins where the number changes. A group is `group_share` of T, rounded down as in LongLoRA's
        code, but at least 2 tokens.
        """
        rows = tuple(_lengths(row) for row in documents)
        if not 0 < group_share <= 1:
            raise LongRopeError(f"the group's share of the length is {group_share}; it must be above 0 and at most 1")
        return cls(rows, max(2, int(sum(rows[0]) * group_share)), shifts)


def _lengths(row: Any) -> tuple[int, ...]:
    documents = np.asarray(row.cpu() if hasattr(row, "cpu") else row)  # a tensor on a GPU has no array
    ends = [*(np.flatnonzero(np.diff(documents)) + 1).tolist(), len(documents)]
    return tuple(end - start for start, end in zip([0, *ends], ends))
