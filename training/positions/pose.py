"""PoSE (arXiv 2309.10400): a window cut into chunks whose positions skip over the target length."""

from __future__ import annotations

import numpy as np

from longrope_export.training.positions.example import Ints, Presented


def pose(length: int, budget: int, target: int, chunks: int, text_offsets: bool, rng: np.random.Generator) -> Presented:
    """`budget` tokens of a document of `length`, as `chunks` chunks with positions in 0…target-1.

    Chunk i of l_i tokens, st_i of them before it, holds text from v_i + st_i and positions from st_i + u_i, where
    v_0 = u_0 = 0, v_i ~ U{v_(i-1) … length - budget} and u_i ~ U{u_(i-1) … target - budget} (equations 2 to 5). Without
    `text_offsets` every v_i is 0: the text stays in one piece and only positions skip. Two chunks are drawn as in the
    released code; a document with fewer tokens than chunks becomes chunks of one token.
    """
    lengths = chunk_lengths(budget, min(chunks, budget), rng)
    text = _ascending(length - budget if text_offsets else 0, len(lengths), rng)
    skips = _ascending(target - budget, len(lengths), rng)
    starts = np.arange(budget, dtype=np.int64)
    return Presented(starts + np.repeat(text, lengths), starts + np.repeat(skips, lengths), True)


def chunk_lengths(total: int, chunks: int, rng: np.random.Generator) -> list[int]:
    """Lengths of `chunks` chunks, at least 1 each, `total` together.

    The released code draws the first of two from 1…⌊(total + 1)/2⌋; the paper does not say how more are drawn. Here
    chunk i of N takes 1…⌊(r + 1)/(N - i)⌋ of the r tokens that are left, which is that rule for N = 2.
    """
    lengths: list[int] = []
    for left in range(chunks, 1, -1):
        rest = total - sum(lengths)
        lengths.append(int(rng.integers(1, (rest + 1) // left, endpoint=True)))
    return [*lengths, total - sum(lengths)]


def _ascending(highest: int, count: int, rng: np.random.Generator) -> Ints:
    values = [0]
    while len(values) < count:
        values.append(int(rng.integers(values[-1], highest, endpoint=True)))
    return np.array(values, dtype=np.int64)
