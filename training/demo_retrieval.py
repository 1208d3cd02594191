"""Synthetic rows that teach retrieval inside the window: repetition, key-value look-ups, passkeys and needles.

A row is put together from pieces, each with one loss weight: running text counts as in any other row, a first mention
that nobody could predict counts nothing, the answer counts most. Nothing here reads a held-out document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from longrope_export.evaluation.passkey import FILLER, INTRODUCTION, LARGEST_KEY, QUESTION

Ids = npt.NDArray[np.int64]
Piece = tuple[list[int], float]

TEXT, KNOWN, FIXED, ANSWER = 1.0, 1.0, 0.02, 4.0  # KNOWN: can be copied; FIXED: a template's unchanging words

NEEDLES = (  # statement, question, what ends the answer
    ("One of the special magic numbers for {name} is: {value}.", "The special magic number for {name} is:", "."),
    ("The value of {name} is {value}. Do not forget it.", "What is the value of {name}? The value of {name} is", "."),
    ("# NOTE: the code for {name} is {value}", "# the code for {name} is", "\n"),
)
CODE = (
    ("{name} = {value}\n", "assert {name} == ", "\n"),
    ('    "{name}": {value},\n', '    result["{name}"] = ', "\n"),
    ("{name}: {value}\n", "print({name})  # ", "\n"),
    ("    def {name}(self): return {value}\n", "        >>> self.{name}()\n        ", "\n"),
)


@dataclass(frozen=True)
class Material:
    """What the generators draw from: the training text as tokens, names found in it, and the tokenizer.

    `encode` maps a text to its token ids without the opening token.
    """

    text: Ids
    names: tuple[str, ...]
    encode: Callable[[str], list[int]]
    vocabulary: int
    garbage: list[int] = field(init=False)
    frequent: Ids = field(init=False)

    def __post_init__(self) -> None:
        counts = np.bincount(self.text, minlength=self.vocabulary)
        object.__setattr__(self, "frequent", np.argsort(-counts, kind="stable")[: int((counts > 0).sum())])
        object.__setattr__(self, "garbage", self.encode(f"{FILLER} " * 40))

    def passage(self, rng: np.random.Generator, length: int) -> list[int]:
        """`length` consecutive tokens of training text."""
        start = int(rng.integers(0, len(self.text) - length))
        return [int(token) for token in self.text[start : start + length]]

    def babble(self, rng: np.random.Generator, length: int) -> list[int]:
        """`length` random tokens out of the most frequent ones, sixteen at least."""
        alphabet = _log_uniform(rng, min(16, len(self.frequent)), len(self.frequent))
        return [int(token) for token in self.frequent[rng.integers(0, alphabet, length)]]

    def fillers(self, rng: np.random.Generator, lengths: list[int]) -> list[Piece]:
        """Irrelevant text of the given lengths: all of it the standard sentences, or all of it training text."""
        if rng.random() < 0.5:
            return [(self.passage(rng, length), TEXT) for length in lengths]
        return [(self.garbage[:length], FIXED) for length in lengths]

    def number(self, rng: np.random.Generator) -> str:
        """A number of one to seven digits, most often five."""
        digits = int(rng.choice([1, 2, 3, 4, 5, 6, 7], p=[0.04, 0.06, 0.1, 0.15, 0.45, 0.1, 0.1]))
        return str(rng.integers(10 ** (digits - 1), 10**digits))

    def name(self, rng: np.random.Generator) -> str:
        """A name that occurs in the training text."""
        return self.names[int(rng.integers(len(self.names)))]


def repetition(rng: np.random.Generator, material: Material, length: int) -> list[Piece]:
    """Segments of text or of random tokens, each again and again, sometimes with a little text between.

    Lengths are log-uniform from 1 to half the row, and so are the alphabets that random tokens come from: repeating one
    token is learned at once, then two, and induction grows from there. Long random segments alone started nothing.
    """
    pieces: list[Piece] = []
    while (room := _room(length, [ids for ids, _ in pieces])) > 0:
        size = _log_uniform(rng, 1, length // 2)
        first = (material.passage(rng, size), TEXT) if rng.random() < 0.5 else (material.babble(rng, size), 0.0)
        again: list[Piece] = [(first[0], KNOWN)]
        if size > 4 and rng.random() < 0.4:  # behind other text, two tokens only say which segment comes back
            between = material.passage(rng, int(rng.integers(1, 20)))
            again = [(between, TEXT), (first[0][:2], 0.0), (first[0][2:], KNOWN)]
        times = min(max(1, room // size), int(rng.integers(2, 16)))
        pieces += [first, *(again * times), (material.passage(rng, int(rng.integers(1, 10))), TEXT)]
    return pieces


def look_up(rng: np.random.Generator, material: Material, length: int) -> list[Piece]:
    """Several names with values in code, text between, then the names asked for in another order."""
    statement, question, end = CODE[int(rng.integers(len(CODE)))]
    pairs = {material.name(rng): _value(rng, material) for _ in range(int(rng.integers(1, 9)))}
    stated = [material.encode("\n" + statement.format(name=n, value=v)) for n, v in pairs.items()]
    asked: list[Piece] = []
    for index in rng.permutation(len(pairs)):
        name, value = list(pairs.items())[int(index)]
        asked += [(material.encode(question.format(name=name)), FIXED), (material.encode(value + end), ANSWER)]
    room = _room(length, [*stated, *(ids for ids, _ in asked)])
    return [*_spread(rng, stated, lambda gaps: [(material.passage(rng, gap), TEXT) for gap in gaps], room), *asked]


def needle(rng: np.random.Generator, material: Material, length: int) -> list[Piece]:
    """One to three statements in filler, one of them asked for at the end."""
    statement, question, end = NEEDLES[int(rng.integers(len(NEEDLES)))]
    pairs = [(material.name(rng), material.number(rng)) for _ in range(int(rng.integers(1, 4)))]
    stated = [material.encode("\n" + statement.format(name=n, value=v) + "\n") for n, v in pairs]
    name, value = pairs[int(rng.integers(len(pairs)))]
    asked, answer = material.encode("\n" + question.format(name=name)), material.encode(f" {value}{end}")
    room = _room(length, [*stated, asked, answer])
    return [
        *_spread(rng, stated, lambda gaps: material.fillers(rng, gaps), room),
        (asked, FIXED),
        (answer, ANSWER),
    ]


def passkey(rng: np.random.Generator, material: Material, length: int) -> list[Piece]:
    """The standard passkey prompt with its answer, the key at any depth, from 160 tokens to the whole window."""
    key = str(rng.integers(1, LARGEST_KEY + 1)) if rng.random() < 0.7 else material.number(rng)
    introduction, asked = material.encode(INTRODUCTION + "\n"), material.encode("\n" + QUESTION)
    stated, again = material.encode(f"\nThe pass key is {key}. Remember it."), material.encode(f" {key}")
    closing, answer = material.encode(" is the pass key.\n"), material.encode(f" {key}.")
    whole = length if rng.random() < 0.6 else int(rng.integers(min(160, length), length + 1))
    room = _room(whole, [introduction, stated, again, closing, asked, answer])
    before = int(rng.integers(0, room + 1))
    above, below = material.fillers(rng, [before, room - before])
    known: list[Piece] = [(again, ANSWER / 2), (closing, FIXED)]
    return [(introduction, FIXED), above, (stated, FIXED), *known, below, (asked, FIXED), (answer, ANSWER)]


GENERATORS: dict[str, Callable[[np.random.Generator, Material, int], list[Piece]]] = {
    "repetition": repetition,
    "look_up": look_up,
    "needle": needle,
    "passkey": passkey,
}


def row(kind: str, rng: np.random.Generator, material: Material, length: int) -> tuple[list[int], list[float]]:
    """Tokens and loss weights of one row of `length` tokens; what a generator leaves free is filled with text."""
    pieces = [([], 0.0)] if kind == "text" else GENERATORS[kind](rng, material, length)
    rest = length - sum(len(ids) for ids, _ in pieces)
    if rest > 0:
        pieces = [*pieces, (material.passage(rng, rest), TEXT)]
    ids = [token for part, _ in pieces for token in part]
    weights = [weight for part, weight in pieces for _ in part]
    return ids[:length], weights[:length]


def _room(length: int, parts: list[list[int]]) -> int:
    return max(0, length - sum(map(len, parts)))


def _spread(
    rng: np.random.Generator, stated: list[list[int]], fill: Callable[[list[int]], list[Piece]], room: int
) -> list[Piece]:
    """The statements in their order with `room` tokens of filler cut at random places around them."""
    cuts = np.sort(rng.integers(0, room + 1, len(stated)))
    gaps = fill([int(gap) for gap in np.diff([0, *cuts, room])])
    pieces = [piece for gap, part in zip(gaps, stated, strict=False) for piece in (gap, (part, FIXED))]
    return [*pieces, gaps[-1]]


def _log_uniform(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number from `low` to `high`, as likely between 1 and 2 as between 32 and 64."""
    return min(high, int(np.exp(rng.uniform(np.log(low), np.log(high + 1)))))


def _value(rng: np.random.Generator, material: Material) -> str:
    return material.number(rng) if rng.random() < 0.6 else repr(material.name(rng))
