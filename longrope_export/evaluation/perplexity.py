"""Perplexity of the "truncated" protocol at several lengths from as few forward passes as are exact.

A row is [BOS] + the text's first tokens; at length n its targets are tokens 2…n. Sums of losses are divided by the
number of tokens over all documents: a mean of per-document means would weigh short ones too much.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longrope_export.errors import NumericalError, TextTooShortError
from longrope_export.evaluation.documents import Row, iter_ids
from longrope_export.evaluation.engine import check_vocabulary, not_finite
from longrope_export.evaluation.losses import body_states, check_head, token_losses
from longrope_export.evaluation.passes import forward_lengths, is_dynamic, original_window, rotation_of
from longrope_export.evaluation.spans import default_span_edges
from longrope_export.evaluation.statistics import exp
from longrope_export.placement import input_device

__all__ = [
    "LengthResult",
    "PerplexityResult",
    "SpanResult",
    "default_span_edges",
    "evaluate_perplexity",
    "token_losses",
]


@dataclass(frozen=True)
class LengthResult:
    """Perplexity exp(ΣNLL/Σtokens) of the rows cut to `length` tokens; `document_nll` are the documents' mean NLLs."""

    length: int
    perplexity: float
    nll: float
    tokens: int
    document_nll: tuple[float, ...]


@dataclass(frozen=True)
class SpanResult:
    """Perplexity of the target tokens with index in [start, end) of the longest rows."""

    start: int
    end: int
    perplexity: float
    tokens: int


@dataclass(frozen=True, eq=False)
class PerplexityResult:
    """Results at every length and span; `losses` maps a forward pass's length to float32 [documents, length-1]."""

    lengths: tuple[LengthResult, ...]
    spans: tuple[SpanResult, ...]
    losses: dict[int, npt.NDArray[np.float32]]
    documents: tuple[str, ...]
    forward_passes: int
    seconds: float

    def at(self, length: int) -> LengthResult:
        """The result at `length`; raises `KeyError` when it was not measured."""
        for result in self.lengths:
            if result.length == length:
                return result
        raise KeyError(length)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form without the per-token losses."""
        return {
            "lengths": [dict(vars(result), document_nll=list(result.document_nll)) for result in self.lengths],
            "spans": [dict(vars(span)) for span in self.spans],
            "documents": list(self.documents),
            "forward_passes": self.forward_passes,
            "seconds": round(self.seconds, 3),
        }


Progress = Callable[[int, int], None]


def evaluate_perplexity(
    model: nn.Module,
    rows: Sequence[Row | npt.ArrayLike],
    lengths: Sequence[int],
    *,
    chunk: int = 512,
    rotation: Callable[[int], Hashable] | None = None,
    span_edges: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of `model` on `rows` (token ids, each at least as long as the longest length) at every length.

    Lengths that use the same rotation share one forward pass per document: `rotation(length)` names it
    (default: `rotation_of(model)`). `progress(done, all)` counts tokens × documents.
    Raises `TextTooShortError`, `NumericalError` for a NaN or infinite loss, and `UnsupportedModelError`.
    """
    ordered = _checked_lengths(lengths)
    ids = [torch.from_numpy(row) for row in iter_ids(rows)]
    names = tuple(row.name if isinstance(row, Row) else f"row {index}" for index, row in enumerate(rows))
    _check_rows(model, ids, names, ordered[-1])
    check_head(model)
    passes = forward_lengths(ordered, rotation or rotation_of(model))
    started = time.perf_counter()
    losses = _run(model, ids, names, sorted(set(passes.values())), chunk, progress)
    return PerplexityResult(
        lengths=tuple(_at_length(losses[passes[length]], length) for length in ordered),
        spans=tuple(_spans(losses[ordered[-1]], span_edges or default_span_edges(ordered[-1], original_window(model)))),
        losses=losses,
        documents=names,
        forward_passes=len(losses) * len(ids),
        seconds=time.perf_counter() - started,
    )


def _run(
    model: nn.Module,
    ids: Sequence[Tensor],
    names: Sequence[str],
    lengths: Sequence[int],
    chunk: int,
    progress: Progress | None,
) -> dict[int, npt.NDArray[np.float32]]:
    device = input_device(model)
    done, everything = 0, sum(lengths) * len(ids)
    losses = {length: np.empty((len(ids), length - 1), np.float32) for length in lengths}
    if is_dynamic(model):
        # transformers keeps the frequencies of the longest call so far; a call of one token resets them.
        with torch.no_grad():
            body_states(model, ids[0][None, :1].to(device))
    for length in lengths:
        for index, row in enumerate(ids):
            with torch.no_grad():
                values = token_losses(model, row[None, :length].to(device), chunk=chunk).cpu().numpy()
            if not np.isfinite(values).all():
                raise NumericalError(f"{names[index]}: {not_finite(values)}")
            losses[length][index] = values
            done += length
            if progress:
                progress(done, everything)
    return losses


def _checked_lengths(lengths: Sequence[int]) -> list[int]:
    ordered = sorted(set(lengths))
    if not ordered or ordered[0] < 2:
        raise TextTooShortError("perplexity needs lengths of at least 2 tokens")
    return ordered


def _check_rows(model: Any, ids: Sequence[Tensor], names: Sequence[str], longest: int) -> None:
    if not ids:
        raise TextTooShortError("there is no text to measure; give at least one document")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for row, name in zip(ids, names):
        if row.shape[0] < longest:
            raise TextTooShortError(f"{name} has {row.shape[0]:,} tokens; {longest:,} are needed")
        check_vocabulary(row.numpy(), vocabulary)


def _at_length(losses: npt.NDArray[np.float32], length: int) -> LengthResult:
    part = losses[:, : length - 1].astype(np.float64)
    nll = float(part.sum() / part.size)
    return LengthResult(length, exp(nll), nll, part.size, tuple(float(value) for value in part.mean(axis=1)))


def _spans(losses: npt.NDArray[np.float32], edges: Sequence[int]) -> Iterator[SpanResult]:
    for start, end in itertools.pairwise(edges):
        part = losses[:, max(start, 1) - 1 : end - 1].astype(np.float64)
        if part.size:
            yield SpanResult(start, end, exp(float(part.mean())), part.size)
