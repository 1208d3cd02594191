"""RULER's word lists, from the package `wonderwords` (MIT)."""

from __future__ import annotations

import bisect
import importlib.util
import itertools
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import overload

from longrope_export.errors import MissingDependencyError
from longrope_export.evaluation.tasks.ruler.draws import shuffled_as_ruler


def available() -> bool:
    """Whether `wonderwords` is installed."""
    return importlib.util.find_spec("wonderwords") is not None


class AdjectiveNouns(Sequence[str]):
    """Every adjective-noun in sorted order, without the six million of them in memory."""

    def __init__(self, adjectives: Iterable[str], nouns: Iterable[str]) -> None:
        self._nouns = sorted(set(nouns))
        # "blue-…" goes on after "blue-eyed-…": adjectives that continue another one are sorted together with it.
        self._groups: list[str | list[str]] = []
        for group in _continued(sorted(set(adjectives), key=lambda word: f"{word}-")):
            pairs = {f"{adjective}-{noun}" for adjective in group for noun in self._nouns} if len(group) > 1 else set()
            self._groups.append(sorted(pairs) if pairs else group[0])
        sizes = (len(self._nouns) if isinstance(group, str) else len(group) for group in self._groups)
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = bisect.bisect_right(self._ends, index)
        inside = index - (self._ends[at - 1] if at else 0)
        group = self._groups[at]
        return f"{group}-{self._nouns[inside]}" if isinstance(group, str) else group[inside]


def _continued(words: list[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for word in words:
        if groups and word.startswith(f"{groups[-1][0]}-"):
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


@cache
def adjective_nouns() -> Sequence[str]:
    """Every adjective-noun of the lists, sorted: the keys of needles."""
    return AdjectiveNouns(_list("adjective"), _list("noun"))


@cache
def plain_words() -> tuple[str, ...]:
    """All nouns, adjectives and verbs in RULER's order."""
    return tuple(shuffled_as_ruler(sorted({word for kind in ("noun", "adjective", "verb") for word in _list(kind)})))


def _list(kind: str) -> list[str]:
    # The package's files rather than its classes, which have changed between versions; it need not even be imported.
    spec = importlib.util.find_spec("wonderwords")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "this RULER task draws from the word lists of wonderwords: pip install 'longrope-export[eval]'"
        )
    text = (Path(spec.origin).parent / "assets" / f"{kind}list.txt").read_text(encoding="utf-8")
    return [line.rstrip() for line in text.splitlines() if line.strip()]
