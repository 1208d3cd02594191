"""Needle in a haystack: a number hidden in real text, over lengths × depths."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from longrope_export.evaluation.needles import TEMPLATES, NeedleRow, needle_row
from longrope_export.evaluation.passkey import PasskeyPrompt
from longrope_export.evaluation.prompts import prompt_style
from longrope_export.evaluation.protocol import Request, TaskOption
from longrope_export.evaluation.tasks.retrieval import MODES, RetrievalTask, option

DEPTHS, TRIALS, TEMPLATE = 5, 2, "magic"


def prompts(request: Request) -> list[PasskeyPrompt]:
    """The prompts of every length, depth and trial; raises `TextTooShortError` where a needle does not fit."""
    depths, trials = option(request, "needle_depths", DEPTHS), option(request, "needle_trials", TRIALS)
    places = [(index + 0.5) / depths for index in range(depths) for _ in range(trials)]
    style = option(request, "needle_prompt", "base")
    rows = needle_rows(request, places, option(request, "needle_template", TEMPLATE), style)
    return [_prompt(row) for row in rows]


def needle_rows(
    request: Request, depths: list[float], template: str, style: str = "base", *, hidden: bool = True
) -> list[NeedleRow]:
    """A row for every length and depth, in the documents in turn; the request's seed draws the keys."""
    texts, around = TEMPLATES[template], prompt_style(request.tokenizer, style)
    rows = []
    for length in request.lengths:
        keys = np.random.default_rng([request.seed, length]).integers(texts.smallest, texts.largest, size=len(depths))
        for index, (key, depth) in enumerate(zip(keys, depths)):
            document = request.documents[index % len(request.documents)].token_ids[:length]
            rows.append(needle_row(document, request.tokenizer, int(key), depth, texts, around, hidden=hidden))
    return rows


def _prompt(row: NeedleRow) -> PasskeyPrompt:
    ids = row.token_ids.tolist()
    return PasskeyPrompt(tuple(ids[: -row.answer_tokens]), tuple(ids[-row.answer_tokens :]), row.key, row.depth)


def settings(request: Request) -> dict[str, Any]:
    """What holds for all rows."""
    return {
        "prompt": option(request, "needle_prompt", "base"),
        "template": option(request, "needle_template", TEMPLATE),
        "documents": [document.name for document in request.documents],
    }


TASK = RetrievalTask(
    name="needle",
    summary="whether the model finds a number hidden in real text",
    title="Needle in a haystack",
    options=(
        TaskOption("needle_depths", "Depths at which needles are hidden.", DEPTHS, click.IntRange(min=1)),
        TaskOption("needle_trials", "Needles per length and depth.", TRIALS, click.IntRange(min=1)),
        TaskOption(
            "needle_mode",
            "Score the number in one forward pass, by generating it, or both.",
            "both",
            click.Choice(list(MODES)),
        ),
        TaskOption(
            "needle_prompt", "Plain text, or the model's chat template.", "base", click.Choice(["base", "chat"])
        ),
        TaskOption(
            "needle_template",
            "What is hidden: LongRoPE2's magic number, or a pass key.",
            TEMPLATE,
            click.Choice(list(TEMPLATES)),
        ),
    ),
    mode="needle_mode",
    reads_documents=True,
    prompts=prompts,
    settings=settings,
)
