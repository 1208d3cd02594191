"""What a search lowers: a weighted mixture of perplexities, and what its documents are then made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import LongRopeError
from longrope_export.evaluation.needles import PASSKEY, needle_row

Row = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

PERPLEXITY, LAST, NEEDLE, SHORT = "perplexity", "last", "needle", "short"
# The parts of a weighted mean; "short" is a penalty on top of it.
AVERAGED = (PERPLEXITY, LAST, NEEDLE)
# What "auto" means where a needle fits and the optimiser is ours: perplexity alone lets retrieval go.
AUTO, WITH_NEEDLES = "auto", "perplexity=0.97,needle=0.03"
LAST_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Piece:
    """One forward pass: `token_ids` int64 [T], and the `weights` float64 [T-1] of the losses of tokens 2…T.

    A `penalty` counts only as far as the weighted loss is above the one of the unchanged model.
    """

    token_ids: Row
    weights: Weights
    penalty: bool = False


Document = tuple[Piece, ...]


def plain(row: Row) -> Document:
    """The document whose loss is the mean over all tokens of the row."""
    return (Piece(row, np.full(len(row) - 1, 1.0 / (len(row) - 1))),)


@dataclass(frozen=True)
class Mixture:
    """Weights by part: "perplexity", "last" (the last `last_share` of the tokens), "needle", and "short", a penalty.

    The first three are a weighted mean, so that exp(loss) stays a (geometric) mean of perplexities.
    """

    weights: Mapping[str, float]
    last_share: float = LAST_SHARE

    @classmethod
    def parse(cls, text: str, last_share: float = LAST_SHARE) -> Mixture:
        """`perplexity`, `needle` or `perplexity=0.7,needle=0.3,short=1`; raises `LongRopeError` for anything else."""
        if not 0.0 < last_share < 1.0:
            raise LongRopeError(f"the last share is {last_share}; it must be above 0 and below 1")
        found: dict[str, float] = {}
        for entry in text.split(","):
            name, _, weight = entry.strip().partition("=")
            if name not in (*AVERAGED, SHORT) or name in found:
                raise LongRopeError(f"the objective {text!r} is not known; mix {', '.join((*AVERAGED, SHORT))}")
            found[name] = _weight(text, weight or "1")
        total = math.fsum(found.get(name, 0.0) for name in AVERAGED)
        if not total:
            raise LongRopeError(f"the objective {text!r} has a penalty alone; add perplexity, last or needle")
        return cls({name: value / total if name in AVERAGED else value for name, value in found.items()}, last_share)

    @property
    def is_perplexity(self) -> bool:
        """Whether exp(loss) is the perplexity of whole documents."""
        return set(self.weights) == {PERPLEXITY}

    def passes(self, scale: float) -> float:
        """Cost of one document in forward passes at L', s = L'/L."""
        return 1.0 + (1.0 / scale if SHORT in self.weights else 0.0)

    def documents(
        self, rows: Sequence[Row], pieces: Sequence[Row], tokenizer: Any, seed: Sequence[int]
    ) -> tuple[Document, ...]:
        """One document per row [L'], with the piece [L] of the same place for the penalty; `seed` draws the keys.

        Depths are stratified over the documents. Raises `LongRopeError` when needles have no tokenizer.
        """
        if NEEDLE in self.weights and tokenizer is None:
            raise LongRopeError("the objective needle needs the model's tokenizer: pass tokenizer=")
        keys = np.random.default_rng(seed).integers(PASSKEY.smallest, PASSKEY.largest, size=len(rows))
        return tuple(
            self._document(row, piece, tokenizer, int(key), (index + 0.5) / len(rows))
            for index, (row, piece, key) in enumerate(zip(rows, pieces, keys))
        )

    def _document(self, row: Row, piece: Row, tokenizer: Any, key: int, depth: float) -> Document:
        weights = self._text_weights(len(row))
        parts = [Piece(row, weights)]
        if NEEDLE in self.weights:
            parts = [needle_piece(row, tokenizer, key, depth, self.weights[NEEDLE], weights)]
        if SHORT in self.weights:
            parts.append(Piece(piece, self.weights[SHORT] * plain(piece)[0].weights, penalty=True))
        return tuple(parts)

    def _text_weights(self, length: int) -> Weights:
        weights = np.full(length - 1, self.weights.get(PERPLEXITY, 0.0) / (length - 1))
        last = max(1, round(self.last_share * length))
        weights[-last:] += self.weights.get(LAST, 0.0) / last
        return weights


def needle_piece(
    row: Row, tokenizer: Any, key: int, depth: float, answer_weight: float = 1.0, text_weights: Weights | None = None
) -> Piece:
    """The row with a pass key at `depth` (0…1) and the question at its end, as long as before, in one pass.

    The answer's tokens count `answer_weight` together. `text_weights` [T-1] by place are for the text around the needle:
    what is not text counts nothing, and their sum stays. Without them only the answer counts. Raises
    `TextTooShortError` when the row has no room for it.
    """
    needle = needle_row(row, tokenizer, key, depth)
    weights = np.zeros(len(row) - 1)
    if text_weights is not None and text_weights.any():
        weights = np.where(needle.is_text[1:], text_weights, 0.0)
        weights *= text_weights.sum() / weights.sum()
    weights[-needle.answer_tokens :] = answer_weight / needle.answer_tokens
    return Piece(needle.token_ids, weights)


def _weight(text: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0.0):
        raise LongRopeError(f"the objective {text!r} has the weight {value!r}; write a number above 0")
    return weight
