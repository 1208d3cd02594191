"""What a task of `longrope eval` is: units of work on an engine, and a JSON result made of what the units gave."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from rich.table import Table

    from longrope_export.evaluation.documents import Row
    from longrope_export.evaluation.rows import ModelRow

# Which factors a unit is computed with: None means those that the row's switch gives a sequence of its length.
Side = Literal["short", "long"] | None
# A unit's answer: JSON values, and float32 arrays (they are journalled as they are, bit for bit).
Value = dict[str, Any]


class Engine(Protocol):
    """One loaded model, rotated as the unit asks; the same calls for transformers and for llama.cpp.

    Token ids are plain sequences of ints with BOS where it belongs: nothing is added. All raise `NumericalError` for
    NaN logits and `UnsupportedModelError` for token ids that the model does not know.
    """

    runtime: str
    tokenizer: Any

    def losses(
        self, token_ids: Sequence[int] | npt.NDArray[np.int64], first: int = 1, offset: int = 0
    ) -> npt.NDArray[np.float32]:
        """Cross entropy in nats of tokens `first`… (the first token has index 0), float32 [tokens - first].

        lm_head runs on what is scored only. `offset` is added to the position ids.
        """
        ...

    def choices(self, token_ids: Sequence[int] | npt.NDArray[np.int64], first: int) -> npt.NDArray[np.int64]:
        """The most likely token (argmax) in the places `first`…, given the tokens before each, int64."""
        ...

    def generate(self, prompt_ids: Sequence[int], count: int) -> list[int]:
        """Greedy continuation by at most `count` token ids; it ends before EOS."""
        ...


@dataclass(frozen=True, eq=False)
class Unit:
    """A piece of work that is journalled and never done twice.

    `key` tells it from every other unit of the row: tasks that need the same unit name it alike and share it. `length`
    is all its tokens with those that it generates: it decides which factors apply, unless `side` does. `cost` is in
    tokens, for the time left.
    """

    key: str
    length: int
    cost: int
    run: Callable[[Engine], Value]
    side: Side = None


@dataclass(frozen=True)
class Wanted:
    """The losses of a document's first `length` tokens, by `side` or, None, as the row's switch has it."""

    length: int
    side: Side = None


@dataclass(frozen=True)
class TaskOption:
    """An option of one task: `needle_depths` is `--needle-depths` on the command line and in `Request.options`.

    `type` is what click takes, a tuple of choices, or "length" (`4k`, `2x`: `Request.options` has tokens). Given while
    its task is not asked for, it is refused.
    """

    name: str
    help: str
    default: Any = None
    type: Any = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, the same for every task and row; there before any model is loaded.

    `lengths` are tokens in ascending order, `window` is L. `documents` are rows of token ids, empty unless a task has
    a `document_tokens` above 0. `data` are the text files that the user gave, empty without `--data`. `rows` are the
    names of the rows, `reference` is the unmodified model's, if there is one.
    `options` holds the values of every task's options. `offset` is added to position ids. `wanted` is what all tasks
    together ask of the documents (`ReadsDocuments`).
    """

    lengths: tuple[int, ...]
    window: int
    seed: int
    tokenizer: Any
    documents: tuple[Row, ...] = ()
    data: tuple[Path, ...] = ()
    rows: tuple[str, ...] = ()
    reference: str | None = None
    runtime: str = "transformers"
    offset: int = 0
    wanted: tuple[Wanted, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def texts(self) -> Iterator[tuple[str, str]]:
        """Name and text of every file in `data`; raises `InputFileError` for one that is not UTF-8 text."""
        from longrope_export.evaluation.documents import read_text

        return ((str(path), read_text(path)) for path in self.data)


class Task(Protocol):
    """One thing that can be measured. A module of `REGISTRY` holds one as `TASK`; it must not import torch itself."""

    name: str
    summary: str
    options: tuple[TaskOption, ...]

    def document_tokens(self, request: Request) -> int:
        """Tokens that every document must have for this task; 0: it needs no documents."""
        ...

    def units(self, request: Request, row: ModelRow) -> Sequence[Unit]:
        """The units of one row, in the order in which they are done.

        Called before the weights are read: raises a `LongRopeError` for what does not fit.
        """
        ...

    def results(
        self, request: Request, rows: Sequence[ModelRow], values: Mapping[str, Mapping[str, Value]]
    ) -> dict[str, Any]:
        """JSON-ready result of all `rows` from row name → unit key → answer; the first row is the reference.

        Has a key "rows" with one object a row name; what holds for all rows (lengths, protocol) stands beside it.
        """
        ...

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """What `results` gave, as rich tables for the terminal."""
        ...

    def measures(self, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """What `results` gave, as CSV lines: `row`, `metric`, `value`, and any of the other `CSV_COLUMNS`."""
        ...


@runtime_checkable
class ReadsDocuments(Protocol):
    """A task that needs losses of whole documents: passes over them are shared with the other tasks of its kind."""

    def wanted(self, request: Request) -> Sequence[Wanted]:
        """What it needs of every document and row; read with `document_passes`."""
        ...


CSV_COLUMNS = ("task", "row", "metric", "value", "low", "high", "count", "length", "start", "end", "depth", "set")
