"""What passkey and needle share: prompts scored in one forward pass and by generation, over lengths × depths."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from longrope_export.evaluation.grid import WAYS, grid, grid_measures, grid_table
from longrope_export.evaluation.passkey import PasskeyPrompt, digits_right, first_number
from longrope_export.evaluation.protocol import Engine, Request, TaskOption, Unit, Value
from longrope_export.evaluation.rows import ModelRow

if TYPE_CHECKING:
    from rich.table import Table

MODES = {"forced": ("forced",), "generate": ("generated",), "both": ("forced", "generated")}


def option(request: Request, name: str, default: Any) -> Any:
    """The value of an option, or `default` where it was not given."""
    value = request.options.get(name)
    return default if value is None else value


def ids_digest(token_ids: Sequence[int]) -> str:
    """Short hash of token ids: what a unit's answer depends on, besides model and factors."""
    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()[:16]


@dataclass(frozen=True)
class RetrievalTask:
    """A task whose prompts hide one number; `prompts` builds them, `mode` and `title` are its option and heading."""

    name: str
    summary: str
    title: str
    options: tuple[TaskOption, ...]
    mode: str
    reads_documents: bool
    prompts: Callable[[Request], list[PasskeyPrompt]]
    settings: Callable[[Request], dict[str, Any]]

    def document_tokens(self, request: Request) -> int:
        """The longest length, when the haystack is the user's text."""
        return max(request.lengths) if self.reads_documents else 0

    def units(self, request: Request, row: ModelRow) -> list[Unit]:
        """One unit a prompt and way of scoring."""
        ways = MODES[option(request, self.mode, "both")]
        return [self._unit(request, prompt, way) for prompt in self.prompts(request) for way in ways]

    def _unit(self, request: Request, prompt: PasskeyPrompt, way: str) -> Unit:
        run = partial(_RUNS[way], prompt=prompt, tokenizer=request.tokenizer)
        return Unit(self._key(prompt, way), prompt.length, prompt.length, run)

    def _key(self, prompt: PasskeyPrompt, way: str) -> str:
        digest = ids_digest([len(prompt.prompt_ids), *prompt.prompt_ids, *prompt.answer_ids])
        return f"{self.name} {way} {prompt.length} depth {prompt.depth:.4g} {digest}"

    def results(
        self, request: Request, rows: Sequence[ModelRow], values: Mapping[str, Mapping[str, Value]]
    ) -> dict[str, Any]:
        """By row: a grid of counts for each way of scoring, and every trial."""
        prompts = self.prompts(request)
        return {**self.settings(request), "rows": {row.name: self._row(prompts, values[row.name]) for row in rows}}

    def _row(self, prompts: Sequence[PasskeyPrompt], values: Mapping[str, Value]) -> dict[str, Any]:
        trials = [self._trial(prompt, values) for prompt in prompts]
        lengths = sorted({prompt.length for prompt in prompts})
        return {"lengths": lengths, **{way: grid(trials, way) for way in WAYS}, "trials": trials}

    def _trial(self, prompt: PasskeyPrompt, values: Mapping[str, Value]) -> dict[str, Any]:
        answers = {way: values.get(self._key(prompt, way), {}) for way in WAYS}
        return {
            "length": prompt.length,
            "key": prompt.key,
            "depth": prompt.depth,
            **{way: answer.get("right") for way, answer in answers.items()},
            "text": answers["generated"].get("text"),
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Shares of right answers by row and length."""
        return [grid_table(self.title, result)]

    def measures(self, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Shares of right answers by row, length and depth."""
        return grid_measures(result)


def forced(engine: Engine, prompt: PasskeyPrompt, tokenizer: Any) -> Value:
    """Whether the most likely token is right at every digit of the answer, in one forward pass."""
    chosen = engine.choices([*prompt.prompt_ids, *prompt.answer_ids], len(prompt.prompt_ids))
    return {"right": digits_right(tokenizer, prompt.answer_ids, chosen.tolist())}


def generated(engine: Engine, prompt: PasskeyPrompt, tokenizer: Any) -> Value:
    """Whether the first number of the greedy answer is the key; one token more than the key is generated."""
    ids = engine.generate(prompt.prompt_ids, len(prompt.answer_ids) + 1)
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return {"right": first_number(text) == str(prompt.key), "text": text}


_RUNS: dict[str, Callable[..., Value]] = {"forced": forced, "generated": generated}
