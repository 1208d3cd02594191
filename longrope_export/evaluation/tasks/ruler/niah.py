"""RULER's needles in a haystack: eight settings of one generator."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np

from longrope_export.evaluation.tasks.ruler.draws import Draws, shuffled_as_ruler
from longrope_export.evaluation.tasks.ruler.samples import Maker, Sample
from longrope_export.evaluation.tasks.ruler.templates import NEEDLE, NEEDLE_ONE, NEEDLE_SEVERAL, NOISE
from longrope_export.evaluation.tasks.ruler.words import adjective_nouns

Kind = Literal["words", "numbers", "uuids"]
# Percent of an essay's sentences, of which needles take different ones.
DEPTHS = tuple(int(depth) for depth in np.round(np.linspace(0, 100, num=40)))


@dataclass(frozen=True)
class Setting:
    """What is hidden in what: `keys` needles of `values` values each, of which `queries` keys are asked for."""

    haystack: Literal["noise", "needle", "essay"]
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def needles(self) -> int:
        """Needles that one sample hides."""
        return self.keys * self.values


SETTINGS = {
    "niah_single_1": Setting("noise"),
    "niah_single_2": Setting("essay"),
    "niah_single_3": Setting("essay", value="uuids"),
    "niah_multikey_1": Setting("essay", keys=4),
    "niah_multikey_2": Setting("needle"),
    "niah_multikey_3": Setting("needle", key="uuids", value="uuids"),
    "niah_multivalue": Setting("essay", values=4),
    "niah_multiquery": Setting("essay", keys=4, queries=4),
}
_DRAW: dict[Kind, Callable[[Draws], str]] = {
    "words": lambda draws: draws.random.choice(adjective_nouns()),
    "numbers": Draws.number,
    "uuids": Draws.uuid,
}


def niah_maker(setting: Setting, essay: tuple[str, ...] = ()) -> Maker:
    """Maker of a setting; `essay` is the words of the user's text, where the haystack is an essay."""
    return Maker(partial(niah_sample, setting=setting, essay=essay), setting.needles, NEEDLE_ONE.budget)


def niah_sample(draws: Draws, size: int, *, setting: Setting, essay: tuple[str, ...] = ()) -> Sample:
    """One sample with a haystack of `size` noise sentences, other needles, or words of the essay."""
    keys, values = [], []
    for _ in range(setting.keys):
        keys.append(_DRAW[setting.key](draws))
        values.append([_DRAW[setting.value](draws) for _ in range(setting.values)])
    needles = [_needle(setting, key, value) for key, found in zip(keys, values) for value in found]
    context = _context(draws, size, setting, shuffled_as_ruler(needles), essay)
    asked = draws.random.sample(range(setting.keys), setting.queries)
    query = _listed([keys[index] for index in asked])
    one = setting.queries * setting.values == 1
    template, kind = (NEEDLE_ONE, setting.value[:-1]) if one else (NEEDLE_SEVERAL, setting.value)
    return Sample(
        template.prompt.format(kind=kind, context=context, query=query),
        template.lead.format(kind=kind, query=query),
        tuple(value for index in asked for value in values[index]),
    )


def _needle(setting: Setting, key: str, value: str) -> str:
    return NEEDLE.format(kind=setting.value, key=key, value=value)


def _context(draws: Draws, size: int, setting: Setting, needles: list[str], essay: tuple[str, ...]) -> str:
    if setting.haystack == "essay":
        return _in_essay(draws, needles, _sentences(_words(essay, size)))
    lines = [NOISE] * size
    if setting.haystack == "needle":
        lines = [_needle(setting, _DRAW[setting.key](draws), _DRAW[setting.value](draws)) for _ in range(size)]
    places = sorted(draws.random.sample(range(size), len(needles)), reverse=True)
    for place, needle in zip(places, needles):
        lines.insert(place, needle)
    return "\n".join(lines)


def _in_essay(draws: Draws, needles: list[str], sentences: tuple[str, ...]) -> str:
    ends = sorted(int(len(sentences) * (depth / 100)) for depth in draws.random.sample(DEPTHS, len(needles)))
    starts = [0, *ends]
    parts: list[str] = []
    for start, end, needle in zip(starts, ends, needles):
        parts += [" ".join(sentences[start:end]), needle]
    return " ".join([*parts, " ".join(sentences[ends[-1] :])])


def _words(essay: tuple[str, ...], size: int) -> str:
    """The first `size` words; a text that is shorter is repeated, as RULER does."""
    return " ".join((essay * (size // len(essay) + 1))[:size])


@lru_cache(maxsize=4)
def _sentences(text: str) -> tuple[str, ...]:
    return split_sentences(text)


def split_sentences(text: str) -> tuple[str, ...]:
    """Sentences of a text: each ends in . ! or ? (and what closes quotes and brackets) before white space."""
    return tuple(re.findall(r"""\S.*?(?:[.!?]+["')\]]*(?=\s)|$)""", text.strip(), flags=re.DOTALL))


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
