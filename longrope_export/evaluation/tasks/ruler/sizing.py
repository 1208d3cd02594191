"""Haystacks as large as fit: binary search with the model's own tokenizer."""

from __future__ import annotations

from collections.abc import Callable

from longrope_export.evaluation.tasks.ruler.draws import Draws
from longrope_export.evaluation.tasks.ruler.samples import Maker, Sample

Tokens = Callable[[Sample], int]


def largest_size(fits: Callable[[int], bool], smallest: int, most: int | None = None) -> int | None:
    """The largest size that `fits`, from `smallest` to `most`, when larger ones fit less; None when not one does."""
    if not fits(smallest):
        return None
    fitting, beyond = smallest, 2 * smallest
    while (most is None or beyond <= most) and fits(beyond):
        fitting, beyond = beyond, 2 * beyond
    if most is not None:
        beyond = min(beyond, most + 1)
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        fitting, beyond = (middle, beyond) if fits(middle) else (fitting, middle)
    return fitting


def fitting_sizes(maker: Maker, seed: str, count: int, room: int, tokens: Tokens) -> tuple[list[int], int | None]:
    """Sizes of `count` samples of at most `room` tokens: the first as large as fits, the others so or a little less.

    Without room for one the list is empty, and the second value is the number of tokens that a sample of the smallest
    size has.
    """
    size = largest_size(lambda size: tokens(sample_of(maker, seed, 0, size)) <= room, maker.smallest, maker.largest)
    if size is None:
        return [], tokens(sample_of(maker, seed, 0, maker.smallest))
    sizes = []
    for index in range(count):
        # Other words split into other tokens: a few steps down are enough, nearly always none.
        steps = range(size, maker.smallest - 1, -1)
        found = next((step for step in steps if tokens(sample_of(maker, seed, index, step)) <= room), None)
        if found is None:
            return [], tokens(sample_of(maker, seed, index, maker.smallest))
        sizes.append(found)
    return sizes, None


def sample_of(maker: Maker, seed: str, index: int, size: int) -> Sample:
    """Sample `index`, drawn from `seed` and `index` alone."""
    return maker.make(Draws(f"{seed} {index}"), size)
