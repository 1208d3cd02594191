"""Passkey retrieval: a number in filler sentences (landmark attention's template), over lengths × depths."""

from __future__ import annotations

from typing import Any

import click

from longrope_export.evaluation.passkey import PasskeyPrompt, passkey_prompts
from longrope_export.evaluation.prompts import prompt_style
from longrope_export.evaluation.protocol import Request, TaskOption
from longrope_export.evaluation.tasks.retrieval import MODES, RetrievalTask, option

TRIALS = 10


def prompts(request: Request) -> list[PasskeyPrompt]:
    """The prompts of every length; raises `TextTooShortError` where the template does not fit."""
    style = prompt_style(request.tokenizer, option(request, "passkey_prompt", "base"))
    trials, depths = option(request, "trials", TRIALS), option(request, "passkey_depths", None)
    return [
        prompt
        for length in request.lengths
        for prompt in passkey_prompts(request.tokenizer, length, trials, request.seed, depths=depths, style=style)
    ]


def settings(request: Request) -> dict[str, Any]:
    """What holds for all rows."""
    return {
        "prompt": option(request, "passkey_prompt", "base"),
        "trials": option(request, "trials", TRIALS),
        "depths": "(i mod depths + 0.5) / depths",
    }


TASK = RetrievalTask(
    name="passkey",
    summary="whether the model finds a number in filler text",
    title="Passkey retrieval",
    options=(
        TaskOption("trials", "Passkeys per length.", TRIALS, click.IntRange(min=1)),
        TaskOption(
            "passkey_depths", "Depths that the trials are spread over [default: one each].", None, click.IntRange(min=1)
        ),
        TaskOption(
            "passkey_mode",
            "Score the key in one forward pass, by generating it, or both.",
            "both",
            click.Choice(list(MODES)),
        ),
        TaskOption(
            "passkey_prompt", "Plain text, or the model's chat template.", "base", click.Choice(["base", "chat"])
        ),
    ),
    mode="passkey_mode",
    reads_documents=False,
    prompts=prompts,
    settings=settings,
)
