"""Synthetic rows that teach retrieval inside the window: repetition, key-value look-ups, passkeys and needles.

Each generator returns a row's token ids and one loss weight a token: zero where a token cannot be predicted (a first
mention), more than one where the answer stands. Nothing here reads a held-out document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from longrope_export.evaluation.passkey import FILLER, INTRODUCTION, LARGEST_KEY, QUESTION

Ids = npt.NDArray[np.int64]
Row = tuple[list[int], list[float]]

ANSWER_WEIGHT = 4.0

# (statement, question, answer's end); the last two words of a question repeat those before the value in the statement.
NEEDLES = (
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "garbage", self.encode(f"{FILLER} " * 40))

    def passage(self, rng: np.random.Generator, length: int) -> list[int]:
        """`length` consecutive tokens of training text."""
        start = int(rng.integers(0, len(self.text) - length))
        return [int(token) for token in self.text[start : start + length]]

    def filler(self, rng: np.random.Generator, length: int) -> list[int]:
        """`length` tokens of irrelevant text: the standard garbage or training text."""
        if rng.random() < 0.5:
            return self.passage(rng, length)
        return self.garbage[:length]

    def number(self, rng: np.random.Generator) -> str:
        """A number of one to seven digits, most often five."""
        digits = int(rng.choice([1, 2, 3, 4, 5, 6, 7], p=[0.04, 0.06, 0.1, 0.15, 0.45, 0.1, 0.1]))
        return str(rng.integers(10 ** (digits - 1), 10**digits))

    def name(self, rng: np.random.Generator) -> str:
        return self.names[int(rng.integers(len(self.names)))]


def repetition(rng: np.random.Generator, material: Material, length: int) -> Row:
    """A random segment, of text or of random tokens, again and again; sometimes with a little text between."""
    size = int(rng.integers(4, max(5, length // 2)))
    segment = (
        [int(token) for token in rng.integers(1, material.vocabulary, size)]
        if rng.random() < 0.5
        else material.passage(rng, size)
    )
    gap = int(rng.integers(0, 20)) if rng.random() < 0.4 else 0
    ids, weights = list(segment), [0.0] * size
    while len(ids) < length:
        ids += material.passage(rng, gap) + segment
        # The first two tokens only say which segment comes back.
        weights += [0.0] * gap + [0.0] * 2 * (gap > 0) + [1.0] * (size - 2 * (gap > 0))
    return ids[:length], weights[:length]


def look_up(rng: np.random.Generator, material: Material, length: int) -> Row:
    """Several names with values in code, filler between, then some of the names asked for in another order."""
    statement, question, end = CODE[int(rng.integers(len(CODE)))]
    count = int(rng.integers(1, 9))
    pairs = {material.name(rng): _value(rng, material) for _ in range(count)}
    ids: list[int] = []
    weights: list[float] = []
    room = length - 30 * len(pairs)
    for name, value in pairs.items():
        filler = material.passage(rng, int(rng.integers(0, max(1, room // len(pairs)))))
        stated = material.encode("\n" + statement.format(name=name, value=value))
        ids += filler + stated
        weights += [0.0] * (len(filler) + len(stated))
    for index in rng.permutation(len(pairs)):
        name, value = list(pairs.items())[int(index)]
        _ask(ids, weights, material.encode(question.format(name=name)), material.encode(value + end))
    return ids[:length], weights[:length]


def needle(rng: np.random.Generator, material: Material, length: int) -> Row:
    """One to three statements in filler, one of them asked for at the end."""
    statement, question, end = NEEDLES[int(rng.integers(len(NEEDLES)))]
    pairs = [(material.name(rng), material.number(rng)) for _ in range(int(rng.integers(1, 4)))]
    stated = [material.encode("\n" + statement.format(name=n, value=v) + "\n") for n, v in pairs]
    name, value = pairs[int(rng.integers(len(pairs)))]
    asked, answer = material.encode("\n" + question.format(name=name)), material.encode(f" {value}{end}")
    room = max(0, length - sum(map(len, stated)) - len(asked) - len(answer))
    cuts = np.sort(rng.integers(0, room + 1, len(stated))).tolist()
    ids: list[int] = []
    for part, gap in zip(stated, np.diff([0, *cuts]).tolist(), strict=True):
        ids += material.filler(rng, gap) + part
    ids += material.filler(rng, room - cuts[-1])
    weights = [0.0] * len(ids)
    _ask(ids, weights, asked, answer)
    return ids[:length], weights[:length]


def passkey(rng: np.random.Generator, material: Material, length: int) -> Row:
    """The standard passkey prompt with its answer, at any depth, from 160 tokens to the whole window."""
    key = str(rng.integers(1, LARGEST_KEY + 1)) if rng.random() < 0.7 else material.number(rng)
    introduction = material.encode(INTRODUCTION + "\n")
    stated, again = material.encode(f"\nThe pass key is {key}. Remember it."), material.encode(f" {key}")
    closing = material.encode(" is the pass key.\n")
    asked, answer = material.encode("\n" + QUESTION), material.encode(f" {key}.")
    whole = length if rng.random() < 0.6 else int(rng.integers(min(160, length), length + 1))
    fixed = len(introduction + stated + again + closing + asked + answer)
    room = max(0, whole - fixed)
    before = int(rng.integers(0, room + 1))
    head = introduction + material.filler(rng, before) + stated
    tail = closing + material.filler(rng, room - before)
    ids = head + again + tail
    weights = [0.02] * len(head) + [ANSWER_WEIGHT / 2] * len(again) + [0.02] * len(tail)
    _ask(ids, weights, asked, answer)
    rest = max(0, length - len(ids))
    return (ids + material.passage(rng, rest))[:length], (weights + [0.0] * rest)[:length]


def _ask(ids: list[int], weights: list[float], question: list[int], answer: list[int]) -> None:
    ids += question + answer
    weights += [0.02] * len(question) + [ANSWER_WEIGHT] * len(answer)


def _value(rng: np.random.Generator, material: Material) -> str:
    return material.number(rng) if rng.random() < 0.6 else repr(material.name(rng))


GENERATORS: dict[str, Callable[[np.random.Generator, Material, int], Row]] = {
    "repetition": repetition,
    "look_up": look_up,
    "needle": needle,
    "passkey": passkey,
}
