"""LongPPL (arXiv 2410.23771): perplexity of the tokens that a long context makes predictable, and no others.

A token is a key token when its loss falls by more than α = 2 nats from a short context to the whole one, and its
log-likelihood in the whole one is above β = −2. The model (or another row) is its own evaluator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import LongRopeError
from longrope_export.evaluation.document_passes import document_losses, pass_units, plan_passes
from longrope_export.evaluation.documents import Row, bos_ids
from longrope_export.evaluation.protocol import Engine, Request, TaskOption, Unit, Value, Wanted
from longrope_export.evaluation.rows import ModelRow
from longrope_export.evaluation.statistics import exp, interval, weighted_mean

if TYPE_CHECKING:
    from rich.table import Table

Losses = npt.NDArray[np.float32]
Keys = npt.NDArray[np.bool_]

ALPHA, BETA = 2.0, -2.0
# The paper's short context; a smaller window takes three quarters of its own, and a stride of a quarter of the context.
MOST_CONTEXT = 4_096
SELF = "self"


class LongPplTask:
    """exp of the mean loss over the key tokens of all documents."""

    name = "longppl"
    summary = "LongPPL: perplexity of the tokens that only a long context predicts"
    options = (
        TaskOption("longppl_context", "Tokens of the short context [default: 4,096, or 3/4 of a smaller window].", None, "length"),
        TaskOption("longppl_stride", "Tokens scored by each short context [default: a quarter of it].", None, int),
        TaskOption("longppl_alpha", f"Nats by which a key token's loss must fall [default: {ALPHA:g}].", None, float),
        TaskOption("longppl_beta", f"Log-likelihood that a key token must have [default: {BETA:g}].", None, float),
        TaskOption("longppl_evaluator", "Row whose key tokens are taken for every row [default: each row's own].", None, str),
    )  # fmt: skip

    def document_tokens(self, request: Request) -> int:
        """The longest length."""
        return max(request.lengths)

    def wanted(self, request: Request) -> list[Wanted]:
        """Every length beyond the short context."""
        context, _ = self._context(request)
        return [Wanted(length) for length in request.lengths if length > context]

    def units(self, request: Request, row: ModelRow) -> list[Unit]:
        """The passes over whole documents, and one unit a document for its short contexts."""
        context, stride = self._context(request)
        _check_evaluator(request)
        longest = max(request.lengths)
        short = [
            Unit(
                key=self._key(request, index),
                length=context + stride,
                cost=sum(end - start for start, end in short_windows(longest, context, stride)),
                run=partial(
                    _short_losses, document=document, longest=longest, context=context, stride=stride,
                    bos=bos_ids(request.tokenizer),
                ),
            )
            for index, document in enumerate(request.documents)
        ]  # fmt: skip
        return [*pass_units(request, row, self.wanted(request)), *short]

    def _context(self, request: Request) -> tuple[int, int]:
        context = int(request.options.get("longppl_context") or min(MOST_CONTEXT, 3 * request.window // 4))
        stride = int(request.options.get("longppl_stride") or max(1, context // 4))
        if stride < 1 or context < 2:
            raise LongRopeError("--longppl-context must be at least 2 tokens, and --longppl-stride at least 1")
        if context >= max(request.lengths):
            raise LongRopeError(
                f"LongPPL compares with a context of {context:,} tokens and the longest length is "
                f"{max(request.lengths):,}: give a longer length or a smaller --longppl-context"
            )
        return context, stride

    def _thresholds(self, request: Request) -> tuple[float, float]:
        given = (request.options.get("longppl_alpha"), request.options.get("longppl_beta"))
        return ALPHA if given[0] is None else float(given[0]), BETA if given[1] is None else float(given[1])

    def _key(self, request: Request, document: int) -> str:
        context, stride = self._context(request)
        return f"longppl {context} by {stride} of {max(request.lengths)} document {document}"

    def results(
        self, request: Request, rows: Sequence[ModelRow], values: Mapping[str, Mapping[str, Value]]
    ) -> dict[str, Any]:
        """By row and length: LongPPL, the number of key tokens, and the perplexity of all eligible tokens."""
        context, stride = self._context(request)
        alpha, beta = self._thresholds(request)
        evaluator = request.options.get("longppl_evaluator") or SELF
        return {
            "context": context,
            "stride": stride,
            "alpha": alpha,
            "beta": beta,
            "evaluator": evaluator,
            "rows": {
                row.name: {
                    "lengths": [
                        self._entry(request, wanted, row, _evaluator(evaluator, row, rows), values)
                        for wanted in self.wanted(request)
                    ]
                }
                for row in rows
            },
        }

    def _entry(
        self,
        request: Request,
        wanted: Wanted,
        row: ModelRow,
        evaluator: ModelRow,
        values: Mapping[str, Mapping[str, Value]],
    ) -> dict[str, Any]:
        context, _ = self._context(request)
        keys = self._keys(request, wanted, evaluator, values[evaluator.name])
        losses = [full[context - 1 :] for full in document_losses(request, row, wanted, values[row.name])]
        every = [float(found.sum(dtype=np.float64)) for found in losses], [len(found) for found in losses]
        sums = [float(found[key].sum(dtype=np.float64)) for found, key in zip(losses, keys)]
        counts = [int(key.sum()) for key in keys]
        low, high = interval(sums, counts, exp)
        return {
            "length": wanted.length,
            "set": plan_passes(request, row)[wanted].label,
            "longppl": exp(weighted_mean(sums, counts)) if sum(counts) else None,
            "low": low,
            "high": high,
            "key_tokens": sum(counts),
            "tokens": sum(every[1]),
            "perplexity": exp(weighted_mean(*every)),
        }

    def _keys(self, request: Request, wanted: Wanted, row: ModelRow, values: Mapping[str, Value]) -> list[Keys]:
        context, _ = self._context(request)
        full = document_losses(request, row, wanted, values)
        short = [values[self._key(request, index)]["losses"] for index in range(len(request.documents))]
        return [
            key_tokens(near[: wanted.length - context], far[context - 1 :], *self._thresholds(request))
            for near, far in zip(short, full)
        ]

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """LongPPL by row and length."""
        from longrope_export.evaluation.tables import longppl_table

        return [longppl_table(result)]

    def measures(self, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """LongPPL and the number of key tokens by row and length."""
        for name, row in result["rows"].items():
            for entry in row["lengths"]:
                if entry["longppl"] is not None:
                    yield {"row": name, "metric": "LongPPL", "value": entry["longppl"], "count": entry["key_tokens"],
                           **{key: entry[key] for key in ("low", "high", "length", "set")}}  # fmt: skip


def _check_evaluator(request: Request) -> None:
    name = request.options.get("longppl_evaluator") or SELF
    if name != SELF and name not in request.rows:
        raise LongRopeError(f"--longppl-evaluator {name}: no such row; choose from {', '.join(request.rows)}")


def _evaluator(name: str, row: ModelRow, rows: Sequence[ModelRow]) -> ModelRow:
    return row if name == SELF else next(entry for entry in rows if entry.name == name)


def key_tokens(short: Losses, full: Losses, alpha: float, beta: float) -> Keys:
    """Which tokens lose more than `alpha` nats by the whole context and are then likelier than e^`beta`."""
    return np.asarray((short - full > alpha) & (-full > beta))


def short_windows(longest: int, context: int, stride: int) -> list[tuple[int, int]]:
    """Start and end of the short contexts: each scores what follows its first `context` tokens, `stride` at most."""
    return [(start, min(start + context + stride, longest)) for start in range(0, longest - context, stride)]


def _short_losses(engine: Engine, *, document: Row, longest: int, context: int, stride: int, bos: list[int]) -> Value:
    """The losses of the tokens with index `context`… of a document, each with `context` to `context + stride` before it."""
    found = []
    for start, end in short_windows(longest, context, stride):
        part = document.token_ids[start:end].copy()
        part[: len(bos)] = bos
        found.append(engine.losses(part, first=context))
    return {"losses": np.concatenate(found)}


TASK = LongPplTask()
