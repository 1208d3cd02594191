"""How a question is put to a model: as plain text, or as a user's turn of the model's own chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longrope_export.evaluation.documents import bos_ids, encode

Style = Literal["base", "chat"]


@dataclass(frozen=True)
class PromptStyle:
    """Token ids before a prompt's text, and between its question and the beginning of the answer.

    `closing` None is plain text: question and answer are one line.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the style adds to the text."""
        return len(self.opening) + len(self.closing or ())


def base_style(tokenizer: Any) -> PromptStyle:
    """Plain text after BOS, if the tokenizer has one."""
    return PromptStyle(tuple(bos_ids(tokenizer)))


def prompt_style(tokenizer: Any, style: str) -> PromptStyle:
    """The style called "base" or "chat"; raises `InputFileError` when the model has no chat template that can be used."""
    from longrope_export.evaluation.chat import chat_style

    return chat_style(tokenizer) if style == "chat" else base_style(tokenizer)


def ask(tokenizer: Any, style: PromptStyle, question: str, lead: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of the prompt's end (`question`, then `lead`, with which the answer begins), and of " " + `answer`.

    In plain text both stand on one line, in a chat the lead opens the model's own turn.
    """
    if style.closing is None:
        return split_answer(tokenizer, f"{question} {lead}", f" {answer}")
    before, after = split_answer(tokenizer, lead, f" {answer}")
    return [*encode(tokenizer, question), *style.closing, *before], after


def split_answer(tokenizer: Any, before: str, answer: str) -> tuple[list[int], list[int]]:
    """Ids of `before` and of `answer`, tokenised together: alone, the answer's first token can be another one."""
    alone, both = encode(tokenizer, before), encode(tokenizer, before + answer)
    shared = 0
    while shared < min(len(alone), len(both)) and alone[shared] == both[shared]:
        shared += 1
    return both[:shared], both[shared:]
