"""Packing: pieces of documents into rows of equal length, without a token of padding."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Span = tuple[int, int, int]  # document, start, length

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Packed:
    """Rows of pieces: row r is `pieces[bounds[r]:bounds[r + 1]]`, int64 [pieces, 3] of (document, start, length)."""

    pieces: npt.NDArray[np.int64]
    bounds: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def row(self, number: int) -> list[Span]:
        """The pieces of one row, in order."""
        rows = self.pieces[self.bounds[number] : self.bounds[number + 1]]
        return [(int(document), int(start), int(length)) for document, start, length in rows]


def pack(spans: Iterable[Span], row_length: int, packing: str) -> Packed:
    """Fill rows of exactly `row_length` tokens from `spans`; less than one row of tokens stays over.

    A row takes the longest piece that fits in what is left of it (`best-fit`; the earlier of two equal ones), or the
    first in order that fits (`first-fit`). When none fits, the longest or the first of all is cut: its beginning fills
    the row, its rest waits for another one, behind the others.
    """
    pool = PACKINGS[packing](row_length)
    tokens = 0
    for span in spans:
        pool.add(span)
        tokens += span[2]
    pieces: list[Span] = []
    bounds = [0]
    for _ in range(tokens // row_length):
        pieces += _fill(pool, row_length)
        bounds.append(len(pieces))
    return Packed(np.array(pieces, dtype=np.int64).reshape(-1, 3), np.array(bounds, dtype=np.int64))


def _fill(pool: _Pool, row_length: int) -> list[Span]:
    row: list[Span] = []
    left = row_length
    while left:
        document, start, length = pool.take(left)
        if length > left:
            pool.add((document, start + left, length - left))
            length = left
        row.append((document, start, length))
        left -= length
    return row


class _Pool(Protocol):
    def add(self, span: Span) -> None: ...

    def take(self, left: int) -> Span: ...


class _BestFit:
    def __init__(self, row_length: int) -> None:
        self._waiting: dict[int, deque[Span]] = {}
        self._lengths: list[int] = []

    def add(self, span: Span) -> None:
        length = span[2]
        if length not in self._waiting:
            self._waiting[length] = deque()
            bisect.insort(self._lengths, length)
        self._waiting[length].append(span)

    def take(self, left: int) -> Span:
        # Nothing that fits gives -1: the longest of all.
        place = bisect.bisect_right(self._lengths, left) - 1
        length = self._lengths[place]
        span = self._waiting[length].popleft()
        if not self._waiting[length]:
            del self._waiting[length], self._lengths[place]
        return span


class _FirstFit:
    def __init__(self, row_length: int) -> None:
        self._waiting: dict[int, deque[tuple[int, Span]]] = {}
        # Place in the order of the first waiting piece of each length; what is longer than a row stands last.
        self._first = np.full(row_length + 2, _NEVER, dtype=np.int64)
        self._added = 0

    def add(self, span: Span) -> None:
        length = min(span[2], len(self._first) - 1)
        waiting = self._waiting.setdefault(length, deque())
        waiting.append((self._added, span))
        self._first[length] = waiting[0][0]
        self._added += 1

    def take(self, left: int) -> Span:
        length = int(self._first[: left + 1].argmin())
        if self._first[length] == _NEVER:
            length = int(self._first.argmin())
        waiting = self._waiting[length]
        _, span = waiting.popleft()
        self._first[length] = waiting[0][0] if waiting else _NEVER
        return span


PACKINGS: dict[str, Callable[[int], _Pool]] = {"best-fit": _BestFit, "first-fit": _FirstFit}
