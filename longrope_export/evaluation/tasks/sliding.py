"""Perplexity of the "sliding" protocol: windows that move by a stride over a longer text, every token scored once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import LongRopeError
from longrope_export.evaluation.documents import Row, bos_ids
from longrope_export.evaluation.protocol import Engine, Request, TaskOption, Unit, Value
from longrope_export.evaluation.rows import ModelRow
from longrope_export.evaluation.tasks.perplexity import length_entry, length_measures

if TYPE_CHECKING:
    from rich.table import Table

DEFAULT_STRIDE = 256


@dataclass(frozen=True)
class Window:
    """Tokens `start`…`end` of a text, of which those from `first` are scored."""

    start: int
    end: int
    first: int


def windows(tokens: int, length: int, stride: int) -> list[Window]:
    """Windows of at most `length` of `tokens` tokens: the first scores all that it can, each later one `stride` more."""
    found = [Window(0, min(length, tokens), 1)]
    while found[-1].end < tokens:
        end = min(found[-1].end + stride, tokens)
        found.append(Window(end - length, end, found[-1].end))
    return found


class SlidingTask:
    """Windows of n tokens, BOS included, over the same text at every length; ΣNLL / Σtokens."""

    name = "sliding"
    summary = "perplexity with windows that slide over a longer text"
    options = (
        TaskOption("stride", f"Tokens that each further window scores [default: {DEFAULT_STRIDE}].", None, int),
        TaskOption("text_tokens", "Tokens of each text to slide over [default: twice the longest length].", None, "length"),
    )  # fmt: skip

    def document_tokens(self, request: Request) -> int:
        """The text that is slid over."""
        longest = max(request.lengths)
        tokens = request.options.get("text_tokens") or 2 * longest
        if tokens < longest:
            raise LongRopeError(
                f"--text-tokens is {tokens:,} and the longest length {longest:,}: a window does not fit; ask for more"
            )
        return int(tokens)

    def units(self, request: Request, row: ModelRow) -> list[Unit]:
        """One unit for each length and document: its windows one after the other."""
        stride, tokens = self._stride(request), self.document_tokens(request)
        return [
            Unit(
                key=self._key(request, length, index),
                length=length,
                cost=sum(window.end - window.start for window in windows(tokens, length, stride)),
                run=partial(
                    _slide, document=document, length=length, stride=stride, tokens=tokens, bos=self._bos(request)
                ),
            )
            for length in request.lengths
            for index, document in enumerate(request.documents)
        ]

    def results(
        self, request: Request, rows: Sequence[ModelRow], values: Mapping[str, Mapping[str, Value]]
    ) -> dict[str, Any]:
        """By row: entries by length as of the truncated protocol."""
        tokens, stride = self.document_tokens(request), self._stride(request)
        return {
            "protocol": "sliding",
            "lengths": list(request.lengths),
            "window": request.window,
            "stride": stride,
            "text_tokens": tokens,
            "documents": [document.name for document in request.documents],
            "rows": {
                row.name: {
                    "lengths": [self._entry(request, row, length, rows, values) for length in request.lengths],
                    "forward_passes": len(request.documents)
                    * sum(len(windows(tokens, length, stride)) for length in request.lengths),
                }
                for row in rows
            },
        }

    def _entry(
        self,
        request: Request,
        row: ModelRow,
        length: int,
        rows: Sequence[ModelRow],
        values: Mapping[str, Mapping[str, Value]],
    ) -> dict[str, Any]:
        def losses(of: ModelRow) -> list[npt.NDArray[np.float32]]:
            keys = [self._key(request, length, index) for index in range(len(request.documents))]
            return [values[of.name][key]["losses"] for key in keys]

        reference = None if row is rows[0] else losses(rows[0])
        return {"length": length, "set": row.factor_set(length).label, **length_entry(losses(row), reference)}

    def _stride(self, request: Request) -> int:
        stride = int(request.options.get("stride") or DEFAULT_STRIDE)
        room = min(request.lengths) - max(1, len(self._bos(request)))
        if not 0 < stride <= room:
            raise LongRopeError(
                f"--stride is {stride:,}; a window of {min(request.lengths):,} tokens can move by 1 to {room:,}"
            )
        return stride

    def _bos(self, request: Request) -> list[int]:
        return bos_ids(request.tokenizer)

    def _key(self, request: Request, length: int, document: int) -> str:
        return f"sliding {length} by {self._stride(request)} over {self.document_tokens(request)} document {document}"

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Perplexity by row and length."""
        from longrope_export.evaluation.tables import length_table

        title = f"Sliding perplexity on {result['text_tokens']:,} tokens of {len(result['documents'])} documents"
        return [length_table(f"{title}, stride {result['stride']:,}", result)]

    def measures(self, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Perplexities by length, and differences in nats a token."""
        for name, row in result["rows"].items():
            for line in length_measures(name, row["lengths"]):
                yield {**line, "metric": f"sliding {line['metric']}"}


def _slide(engine: Engine, *, document: Row, length: int, stride: int, tokens: int, bos: list[int]) -> Value:
    """The losses of tokens 2…`tokens`; every window but the first begins with BOS in place of its first token."""
    ids = document.token_ids[:tokens]
    found = []
    for window in windows(tokens, length, stride):
        part = ids[window.start : window.end].copy()
        part[: len(bos)] = bos
        found.append(engine.losses(part, first=window.first - window.start))
    return {"losses": np.concatenate(found)}


TASK = SlidingTask()
