"""A needle in real text: a row of a document with a fact hidden in it and the question at its end, as long as before.

The search's objective and the tasks that measure retrieval are built of the same rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import TextTooShortError
from longrope_export.evaluation import passkey
from longrope_export.evaluation.documents import bos_ids, encode
from longrope_export.evaluation.prompts import PromptStyle, ask, base_style

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class NeedleTemplate:
    """Texts of a needle; `{key}` is the number to find, drawn from `smallest`…`largest`."""

    introduction: str
    sentence: str
    question: str
    lead: str
    smallest: int
    largest: int


PASSKEY = NeedleTemplate(
    introduction=passkey.INTRODUCTION,
    sentence=passkey.KEY_SENTENCE,
    question=passkey.QUESTION_LINE,
    lead=passkey.LEAD,
    smallest=10_000,
    largest=passkey.LARGEST_KEY,
)
# LongRoPE2 (arXiv 2502.20082) measures needle perplexity with RULER's single needle (NVIDIA/RULER, Apache-2.0).
MAGIC = NeedleTemplate(
    introduction="A special magic number is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the number afterwards.",
    sentence="One of the special magic numbers for numerous-kite is: {key}.",
    question="What is the special magic number for numerous-kite mentioned in the provided text?",
    lead="The special magic number for numerous-kite mentioned in the provided text is",
    smallest=1_000_000,
    largest=9_999_999,
)
TEMPLATES = {"magic": MAGIC, "passkey": PASSKEY}


@dataclass(frozen=True, eq=False)
class NeedleRow:
    """`token_ids` int64 [T]; the answer is the last `answer_tokens` of them; `is_text` [T] marks the document's own."""

    token_ids: Ids
    answer_tokens: int
    is_text: npt.NDArray[np.bool_]
    key: int
    depth: float


def needle_row(
    row: Ids,
    tokenizer: Any,
    key: int,
    depth: float,
    template: NeedleTemplate = PASSKEY,
    style: PromptStyle | None = None,
    *,
    hidden: bool = True,
) -> NeedleRow:
    """The row [T] with the needle at `depth` (0…1) of its text, question and answer at its end; T stays.

    Without `hidden` the needle's place is taken by text, everything else stays: the control that shows whether a score
    is the needle's. Raises `TextTooShortError` when the row has no room.
    """
    style = style or base_style(tokenizer)
    question, answer = ask(tokenizer, style, f"\n{template.question}", template.lead, str(key))
    front = [*style.opening, *encode(tokenizer, template.introduction + "\n")]
    sentence = encode(tokenizer, "\n" + template.sentence.format(key=key) + "\n") if hidden else []
    text = row[len(bos_ids(tokenizer)) :].tolist()
    room = len(row) - len(front) - len(sentence) - len(question) - len(answer)
    if room < 0:
        raise TextTooShortError(
            f"a needle needs {len(row) - room} tokens with this tokenizer and the window is {len(row)}: "
            "ask for a longer length (or leave needle out of --objective)"
        )
    before = min(round(depth * room), room)
    ids = front + text[:before] + sentence + text[before:room] + question + answer
    marks = [
        (front, False),
        (text[:before], True),
        (sentence, False),
        (text[before:room], True),
        (question + answer, False),
    ]
    is_text = np.concatenate([np.full(len(part), mark) for part, mark in marks])
    return NeedleRow(np.array(ids, dtype=np.int64), len(answer), is_text, key, depth)


def needle_fits(tokenizer: Any, length: int) -> bool:
    """Whether a row of `length` tokens is still mostly text with a passkey needle, its introduction and its question."""
    question, answer = ask(
        tokenizer, base_style(tokenizer), f"\n{PASSKEY.question}", PASSKEY.lead, str(PASSKEY.largest)
    )
    introduction = PASSKEY.introduction + PASSKEY.sentence.format(key=PASSKEY.largest)
    around = bos_ids(tokenizer) + encode(tokenizer, introduction) + question
    return 2 * (len(around) + len(answer)) <= length
