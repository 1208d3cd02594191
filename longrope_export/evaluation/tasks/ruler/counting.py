"""RULER's aggregation tasks: the most common of listed words, and the most frequent of coded words."""

from __future__ import annotations

import math
import string
from functools import partial

import numpy as np

from longrope_export.evaluation.tasks.ruler.draws import Draws, shuffled_as_ruler
from longrope_export.evaluation.tasks.ruler.samples import Maker, Sample
from longrope_export.evaluation.tasks.ruler.templates import COMMON_WORDS, FREQUENT_WORDS
from longrope_export.evaluation.tasks.ruler.words import plain_words

COMMON = 10
# RULER repeats words less often in shorter contexts.
LONG = 4_096
_REPEATS = {True: (30, 3), False: (6, 1)}  # of common words and of others
_EXAMPLE = {True: (40, 10, 3), False: (20, 3, 1)}  # different words, and their repeats
CODED_LETTERS = 6
# From here on the third word is more frequent than the fourth.
_LEAST_CODED = 30
_ZETA_2 = math.pi**2 / 6  # α = 2


def common_words_maker(length: int) -> Maker:
    """Maker of lists for contexts of `length` tokens; sizes are different words, at most the list's."""
    make = partial(common_words_sample, long=length >= LONG)
    return Maker(make, 2 * COMMON, COMMON_WORDS.budget, largest=len(plain_words()))


def common_words_sample(draws: Draws, size: int, *, long: bool) -> Sample:
    """One sample: a solved example, then the list of `size` different words."""
    example, answer = _word_list(draws, *_EXAMPLE[long])
    context, common = _word_list(draws, size, *_REPEATS[long])
    solved = f"{COMMON_WORDS.prompt.format(context=example)} {COMMON_WORDS.lead} {_numbered(answer)}"
    return Sample(f"{solved}\n{COMMON_WORDS.prompt.format(context=context)}", COMMON_WORDS.lead, tuple(common))


def _word_list(draws: Draws, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
    chosen = draws.random.sample(plain_words(), size)
    common, others = chosen[:COMMON], chosen[COMMON:]
    return _numbered(shuffled_as_ruler(common * often + others * seldom)), common


def _numbered(words: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def frequent_words_maker(length: int) -> Maker:
    """Maker of coded texts for contexts of `length` tokens; sizes are words before rounding down."""
    vocabulary = max(4, (length - FREQUENT_WORDS.budget) // 50)
    make = partial(frequent_words_sample, vocabulary=vocabulary)
    return Maker(make, _LEAST_CODED, FREQUENT_WORDS.budget)


def frequent_words_sample(draws: Draws, size: int, *, vocabulary: int) -> Sample:
    """One sample: words of a zeta distribution (α = 2), the most frequent replaced by dots."""
    words = [draws.letters(CODED_LETTERS, string.ascii_lowercase) for _ in range(vocabulary)]
    while len(set(words)) < vocabulary:
        words.append(draws.letters(CODED_LETTERS, string.ascii_lowercase))
    ranked = ["...", *shuffled_as_ruler(sorted(set(words)))[1:]]
    counts = (size * np.arange(1, vocabulary + 1, dtype=np.float64) ** -2.0 / _ZETA_2).astype(int)
    text = shuffled_as_ruler([word for word, count in zip(ranked, counts) for _ in range(count)])
    return Sample(FREQUENT_WORDS.prompt.format(context=" ".join(text)), FREQUENT_WORDS.lead, tuple(ranked[1:4]))
