"""The cheap patterns for long documents: S2-Attn (LongLoRA) and shifted cross-chunk attention (SCCA).

A document no longer than a group is attended in full by every head: nothing is to be saved there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from longrope_export.training.attention.blocks import Block, HeadBlocks, documents, triangle
from longrope_export.training.attention.pattern import Pattern

Cut = Callable[[int, int, int], Iterator[Block]]
"""`cut(start, length, group)`: the blocks of a document of more than `group` tokens."""


def s2_blocks(pattern: Pattern, heads: int) -> list[HeadBlocks]:
    """S2-Attn (arXiv 2309.12307): groups, and for the second half of the heads groups shifted by half a group.

    As in the released flash-attention code, the first and the last half group of the shifted heads stand alone; its
    other code path rolls them into one, where the first tokens see the last ones.
    """
    half = heads // 2
    plain, shifted = _all(pattern, _groups), _all(pattern, _shifted_groups)
    return [HeadBlocks(tuple(range(half)), plain), HeadBlocks(tuple(range(half, heads)), shifted)]


def scca_blocks(pattern: Pattern, heads: int) -> list[HeadBlocks]:
    """SCCA (arXiv 2312.07305): queries keep their chunk, keys and values are shifted to later tokens.

    "fixed": the second half of the heads by half a chunk. "flow": head h by h mod n chunks, n being the number of
    whole chunks of a row; where nothing lies so far back, a chunk attends to itself. By true position, no token sees
    a later one.
    """
    if pattern.shifts == "fixed":
        return [
            HeadBlocks(tuple(range(heads // 2)), _all(pattern, _groups)),
            HeadBlocks(tuple(range(heads // 2, heads)), _all(pattern, _half_chunk_back)),
        ]
    chunks = min(heads, max(1, pattern.tokens // pattern.group))
    return [HeadBlocks(tuple(range(back, heads, chunks)), _all(pattern, _chunks_back(back))) for back in range(chunks)]


def _all(pattern: Pattern, cut: Cut) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for start, length in documents(pattern):
        blocks += [triangle(start, length)] if length <= pattern.group else cut(start, length, pattern.group)
    return tuple(blocks)


def _groups(start: int, length: int, group: int) -> Iterator[Block]:
    for first in range(0, length, group):
        yield triangle(start + first, min(group, length - first))


def _shifted_groups(start: int, length: int, group: int) -> Iterator[Block]:
    half = group // 2
    yield triangle(start, half)
    yield from _groups(start + half, length - half, group)


def _half_chunk_back(start: int, length: int, group: int) -> Iterator[Block]:
    half = group // 2
    for first in range(0, length, group):
        keys = max(0, first - half)  # the first key
        middle = first + group - half  # queries from here on see every key of the shifted chunk
        end = min(middle, length)
        yield Block(start + first, end - first, start + keys, end - keys)
        rest = min(first + group, length) - middle
        if rest > 0:
            yield Block(start + middle, rest, start + keys, middle - keys, causal=False)


def _chunks_back(chunks: int) -> Cut:
    def cut(start: int, length: int, group: int) -> Iterator[Block]:
        for first in range(0, length, group):
            size, keys = min(group, length - first), first - chunks * group
            if chunks and keys >= 0:
                yield Block(start + first, size, start + keys, group, causal=False)
            else:
                yield triangle(start + first, size)

    return cut
