"""The random draws of one sample, in the order in which RULER makes them."""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

# What RULER shuffles with, whatever the sample (its default seed).
ORDER_SEED = 42
Item = TypeVar("Item")


class Draws:
    """Two streams with one seed, as in RULER: Python's for nearly everything, numpy's for the values of variables."""

    def __init__(self, seed: int | str) -> None:
        self.random = random.Random(seed)
        # RULER draws from numpy's old generator; the same seed gives the same values there and here.
        self._numpy = np.random.RandomState(seed if isinstance(seed, int) else self._number_of(seed))

    @staticmethod
    def _number_of(seed: str) -> int:
        return random.Random(seed).getrandbits(32)

    def word_value(self) -> int:
        """A variable's value of five digits."""
        return int(self._numpy.randint(10_000, 99_999))

    def number(self) -> str:
        """Seven digits, the first not 0."""
        return str(self.random.randint(10**6, 10**7 - 1))

    def uuid(self) -> str:
        """A random UUID (version 4)."""
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def letters(self, count: int, alphabet: str = string.ascii_uppercase) -> str:
        """`count` letters."""
        return "".join(self.random.choices(alphabet, k=count))


def shuffled_as_ruler(items: Sequence[Item]) -> list[Item]:
    """The items in RULER's fixed order."""
    ordered = list(items)
    random.Random(ORDER_SEED).shuffle(ordered)
    return ordered
