"""What a RULER sample is, and what stands in every maker's place: its text, its answers, its size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from longrope_export.evaluation.tasks.ruler.draws import Draws


@dataclass(frozen=True)
class Sample:
    """One question: `prompt`, the `lead` that opens the answer, and `references`, all of which should be in it."""

    prompt: str
    lead: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Maker:
    """Makes samples: `make(draws, size)`, at least `smallest` (and, where there is no more, `largest`) in size.

    `size` counts what the haystack is made of: sentences, needles or words.
    """

    make: Callable[[Draws, int], Sample]
    smallest: int
    budget: int
    largest: int | None = None
