"""The rows of a training run: long spans and packed short documents, each row a pure function of its number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from longrope_export.errors import LongRopeError, TextTooShortError
from longrope_export.training.data.packing import PACKINGS, Packed, pack
from longrope_export.training.data.shards import TokenStore

Kind = Literal["long", "short"]

# What a random number is for: streams of one seed that never meet.
_LONG, _SHORT, _PRESENTATION = range(3)


@dataclass(frozen=True)
class Piece:
    """`length` tokens of document number `document`, from its token `start` on."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Row:
    """One row: a span of one long document, or short documents packed one behind the other."""

    pieces: tuple[Piece, ...]
    kind: Kind


@dataclass(frozen=True)
class RowOptions:
    """How rows are made of documents; lengths in tokens.

    `length`: a long row as it is trained on, and what the share counts. `span`: what it takes from its document
    (default `length`; more when positions are picked from it). `row_length`: a packed row (default `length`).
    `window`: documents up to it are short (default `row_length`). `cut_longer`: longer ones serve as short ones too, in
    pieces of `window`. `long_share`: share of all tokens that comes in long rows.
    """

    length: int
    span: int | None = None
    row_length: int | None = None
    window: int | None = None
    cut_longer: bool = False
    long_share: float = 1.0
    packing: str = "best-fit"
    seed: int = 0

    def __post_init__(self) -> None:
        lengths = {name: getattr(self, name) for name in ("length", "span", "row_length", "window")}
        for name, value in lengths.items():
            if value is not None and value < 2:
                raise LongRopeError(f"{name} is {value}; a row needs at least 2 tokens")
        if not 0 <= self.long_share <= 1:
            raise LongRopeError(f"long_share is {self.long_share}; give a share of all tokens between 0 and 1")
        if self.packing not in PACKINGS:
            raise LongRopeError(f"packing {self.packing!r} is not known; take one of {', '.join(PACKINGS)}")
        if self.seed < 0:
            raise LongRopeError(f"seed is {self.seed}; give a number from 0 on")
        if self.span is not None and self.span < self.length:
            raise LongRopeError(f"span is {self.span}, which cannot give rows of {self.length} tokens")


class RowPlan(Sequence[Row]):
    """The rows of a run over `documents` (numbers in the store; default all), in their order.

    Row i depends on the options, the documents and i alone, so that a run continues from a row's number. `rows` is how
    many there are (default: one pass, which ends before any text would come again). Passes over long and short
    documents are counted apart, each shuffled anew, long spans from new places. Raises `TextTooShortError` when no
    document is long enough, or short ones do not fill a row.
    """

    def __init__(
        self,
        store: TokenStore,
        options: RowOptions,
        *,
        documents: Sequence[int] | npt.NDArray[np.int64] | None = None,
        rows: int | None = None,
    ) -> None:
        self.store, self.options = store, options
        self.length = options.length
        self.span = options.span or options.length
        self.row_length = options.row_length or options.length
        self.window = options.window or self.row_length
        self._chosen = np.arange(len(store)) if documents is None else np.asarray(documents, dtype=np.int64)
        self._ratio = _share_of_rows(options.long_share, self.length, self.row_length)
        self._long, self._short = self._divide(self._chosen)
        self._spans_before = np.cumsum([0, *(store.lengths[self._long] // self.span)], dtype=np.int64)
        self.long_rows = int(self._spans_before[-1])
        self.short_rows = int(store.lengths[self._short].sum()) // self.row_length
        self._check(self._chosen)
        self._rows = self.rows_of_one_pass if rows is None else rows
        self._passes: dict[tuple[Kind, int], Any] = {}

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # rows are taken one by one
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        before = math.floor(index * self._ratio)
        if math.floor((index + 1) * self._ratio) > before:
            return self._long_row(before)
        return self._short_row(index - before)

    def tokens(self, index: int) -> list[npt.NDArray[np.int64]]:
        """Token ids of row `index`, one int64 array per piece."""
        return [self.store.read(piece.document, piece.start, piece.length) for piece in self[index].pieces]

    def rng(self, index: int) -> np.random.Generator:
        """Random numbers that belong to row `index`, for how its positions are presented."""
        return np.random.default_rng([self.options.seed, _PRESENTATION, index])

    @property
    def rows_of_one_pass(self) -> int:
        """Rows until the long or the short texts have all been taken once."""
        share = self._ratio
        ends = [] if share == 0 else [math.ceil((self.long_rows + 1) / share) - 1]
        ends += [] if share == 1 else [math.floor(self.short_rows / (1 - share))]
        return min(ends)

    def passes(self, rows: int | None = None) -> dict[Kind, float]:
        """How often the texts of each kind are taken in `rows` rows (default: all of the plan's)."""
        count = self._rows if rows is None else rows
        long = math.floor(count * self._ratio)
        taken: dict[Kind, float] = {}
        if self.long_rows:
            taken["long"] = long / self.long_rows
        if self.short_rows:
            taken["short"] = (count - long) / self.short_rows
        return taken

    @property
    def unused(self) -> npt.NDArray[np.int64]:
        """Numbers of the documents that no row takes: too short for a long row, too long for a short one."""
        return np.setdiff1d(self._chosen, np.concatenate([self._long, self._short]))

    def _divide(self, chosen: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        lengths = self.store.lengths[chosen]
        long = chosen[lengths >= self.span] if self._ratio > 0 else chosen[:0]
        if self._ratio == 1:
            return long, chosen[:0]
        return long, chosen if self.options.cut_longer else chosen[lengths <= self.window]

    def _check(self, chosen: npt.NDArray[np.int64]) -> None:
        if not len(chosen):
            raise TextTooShortError("there is no document to train on; give more texts")
        if self._ratio > 0 and not self.long_rows:
            longest = int(chosen[self.store.lengths[chosen].argmax()])
            raise TextTooShortError(
                f"the longest document, {self.store.name(longest)}, has {self.store.lengths[longest]:,} tokens and "
                f"a row takes {self.span:,}: give longer texts, or take shorter rows (--positions pose, --length)"
            )
        if self._ratio < 1 and not self.short_rows:
            tokens = int(self.store.lengths[self._short].sum())
            raise TextTooShortError(
                f"the documents of at most {self.window:,} tokens have {tokens:,} tokens together and a row of short "
                f"documents takes {self.row_length:,}: give more short texts, or cut longer ones too (--cut-longer)"
            )

    def _long_row(self, number: int) -> Row:
        number_of_pass, place = divmod(number, self.long_rows)
        order, offsets = self._pass("long", number_of_pass)
        span = order[place]
        which = int(np.searchsorted(self._spans_before, span, side="right")) - 1
        start = int(offsets[which] + (span - self._spans_before[which]) * self.span)
        return Row((Piece(int(self._long[which]), start, self.span),), "long")

    def _short_row(self, number: int) -> Row:
        number_of_pass, place = divmod(number, self.short_rows)
        order, packed = self._pass("short", number_of_pass)
        return Row(tuple(Piece(*span) for span in packed.row(int(order[place]))), "short")

    def _pass(self, kind: Kind, number: int) -> Any:
        if (kind, number) not in self._passes:
            # Rows are taken in order, a few workers ahead of one another: two passes at most are in use.
            self._passes.pop((kind, number - 2), None)
            begin = self._long_pass if kind == "long" else self._short_pass
            self._passes[kind, number] = begin(number)
        return self._passes[kind, number]

    def _long_pass(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The order of all spans, and where in each document the first one begins: what is left over is shared out."""
        rng = np.random.default_rng([self.options.seed, _LONG, number])
        left = self.store.lengths[self._long] % self.span
        return rng.permutation(self.long_rows), rng.integers(0, left, endpoint=True)

    def _short_pass(self, number: int) -> tuple[npt.NDArray[np.int64], Packed]:
        rng = np.random.default_rng([self.options.seed, _SHORT, number])
        spans = short_spans(self.store, self._short, self.window)
        packed = pack(map(tuple, rng.permutation(spans).tolist()), self.row_length, self.options.packing)
        return rng.permutation(len(packed)), packed


def short_spans(store: TokenStore, documents: npt.NDArray[np.int64], window: int) -> npt.NDArray[np.int64]:
    """int64 [pieces, 3] of (document, start, length): documents whole, longer ones in consecutive pieces of `window`."""
    lengths = store.lengths[documents]
    pieces = -(-lengths // window)
    document, length = np.repeat(documents, pieces), np.repeat(lengths, pieces)
    place = np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = place * window
    return np.stack([document, start, np.minimum(window, length - start)], axis=1)


def _share_of_rows(long_share: float, length: int, row_length: int) -> Fraction:
    """The share of long rows for which long rows hold `long_share` of all tokens."""
    share = Fraction(repr(float(long_share)))
    long, short = share / length, (1 - share) / row_length
    return long / (long + short)
