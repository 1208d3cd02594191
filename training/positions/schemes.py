"""The schemes by name, and the settings that decide what they draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longrope_export.errors import LongRopeError
from longrope_export.training.positions.example import Ints, Presented
from longrope_export.training.positions.pose import pose
from longrope_export.training.positions.random_positions import random_positions
from longrope_export.training.positions.segments import segments


@dataclass(frozen=True, kw_only=True)
class Positions:
    """How positions are presented.

    `target` is L': positions lie in 0…L'-1. `tokens` is what a row costs: the tokens of it that the model sees. It
    equals `target` for full and mixed, and is the training window for pose, random and segments. `window` is L, where
    mixed switches to the long factors. `chunks` (pose) is N, `text_offsets` (pose) draws the chunks from a text of
    `text_factor` windows, `alpha` (segments) is a segment's share of the tokens. Raises `LongRopeError` for settings
    that contradict one another.
    """

    scheme: str
    target: int
    tokens: int
    window: int
    chunks: int = 2
    text_offsets: bool = False
    text_factor: int = 5
    alpha: float = 0.25

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise LongRopeError(f"positions {self.scheme!r} is not known; choose one of {', '.join(SCHEMES)}")
        for name in ("target", "tokens", "window", "text_factor"):
            if getattr(self, name) < 1:
                raise LongRopeError(f"{name} is {getattr(self, name)}; it must be at least 1")
        self._check_tokens()
        if self.scheme == "pose" and not 1 <= self.chunks <= self.tokens:
            raise LongRopeError(f"{self.chunks} chunks do not fit into {self.tokens} tokens")
        if self.scheme == "segments":
            self._check_alpha()

    def _check_tokens(self) -> None:
        if self.tokens > self.target:
            raise LongRopeError(f"a row of {self.tokens} tokens does not fit into positions 0…{self.target - 1}")
        if self.scheme in ("full", "mixed") and self.tokens != self.target:
            raise LongRopeError(
                f"positions {self.scheme} trains on whole rows: {self.tokens} tokens a row cannot reach {self.target}; "
                "choose pose or segments to train on fewer"
            )

    def _check_alpha(self) -> None:
        if not 0 < self.alpha <= 1 or abs(self.segments * self.alpha - 1) > 0.01:
            raise LongRopeError(f"alpha is {self.alpha}; it must be one over a whole number (0.25: four segments)")
        if self.segments > self.tokens:
            raise LongRopeError(f"alpha is {self.alpha}: {self.segments} segments do not fit into {self.tokens} tokens")

    @property
    def segments(self) -> int:
        """Number of segments, 1/α."""
        return round(1 / self.alpha)

    @property
    def text_tokens(self) -> int:
        """Tokens of text that a row's documents should have together, from which `tokens` are presented."""
        if self.scheme == "segments":
            return self.target
        if self.scheme == "pose" and self.text_offsets:
            return self.tokens * self.text_factor
        return self.tokens


Scheme = Callable[[int, int, Positions, np.random.Generator], Presented]
"""`scheme(length, budget, settings, rng)`: at most `budget` tokens of a document of `length` tokens."""


def _whole(length: int) -> Ints:
    return np.arange(length, dtype=np.int64)


def _full(length: int, budget: int, settings: Positions, rng: np.random.Generator) -> Presented:
    return Presented(_whole(budget), _whole(budget), True)


def _mixed(length: int, budget: int, settings: Positions, rng: np.random.Generator) -> Presented:
    """Mixed context windows (arXiv 2502.20082, section 3.3): the document's own length chooses its factors."""
    return Presented(_whole(budget), _whole(budget), budget > settings.window)


def _pose(length: int, budget: int, settings: Positions, rng: np.random.Generator) -> Presented:
    return pose(length, budget, settings.target, settings.chunks, settings.text_offsets, rng)


def _random(length: int, budget: int, settings: Positions, rng: np.random.Generator) -> Presented:
    return random_positions(budget, settings.target, rng)


def _segments(length: int, budget: int, settings: Positions, rng: np.random.Generator) -> Presented:
    return segments(length, budget, settings.segments, rng)


SCHEMES: dict[str, Scheme] = {
    "full": _full,
    "pose": _pose,
    "segments": _segments,
    "random": _random,
    "mixed": _mixed,
}
