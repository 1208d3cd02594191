"""Who attends to whom, as rectangles and triangles of tokens that together see every query exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from longrope_export.training.attention.pattern import Pattern


@dataclass(frozen=True)
class Block:
    """Queries [query, query + queries) over keys [key, key + keys), counted in the tokens of all rows in one line.

    Every query sees every key, except where `causal`: there queries and keys end with the same token, and a query sees
    the keys up to itself. A `window` (causal blocks, as many queries as keys) leaves it the last `window` of them.
    """

    query: int
    queries: int
    key: int
    keys: int
    causal: bool = True
    window: int | None = None


@dataclass(frozen=True)
class HeadBlocks:
    """The blocks of some query heads."""

    heads: tuple[int, ...]
    blocks: tuple[Block, ...]


def documents(pattern: Pattern) -> Iterator[tuple[int, int]]:
    """First token and length of every document."""
    start = 0
    for row in pattern.rows:
        for length in row:
            yield start, length
            start += length


def triangle(start: int, length: int, window: int | None = None) -> Block:
    """Causal attention of `length` tokens among themselves."""
    return Block(start, length, start, length, True, window if window is not None and window < length else None)


def full_blocks(pattern: Pattern, heads: int, window: int | None = None) -> list[HeadBlocks]:
    """Causal attention within each document, over the last `window` tokens where there is one."""
    blocks = tuple(triangle(start, length, window) for start, length in documents(pattern))
    return [HeadBlocks(tuple(range(heads)), blocks)]
