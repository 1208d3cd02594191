"""Whether the texts are long enough for every stage that is left, before the first of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrope_export.errors import LongRopeError, RecipeError, TextTooShortError
from longrope_export.evaluation.documents import evaluation_rows, load_tokenizer
from longrope_export.files import MANIFEST
from longrope_export.recipe.commands import parsed
from longrope_export.recipe.plan import Step
from longrope_export.recipe.workload import workload


def check_lengths(steps: Sequence[Step], model: Path) -> None:
    """Raise `RecipeError` naming the stage whose options do not go together, or whose texts give too few rows.

    `model` is the one with the tokenizer.
    """
    tokenizer = load_tokenizer(model)
    for number, step in enumerate(steps, 1):
        if (step.folder / MANIFEST).is_file():
            continue
        try:
            _check(step, tokenizer)
        except LongRopeError as error:
            raise RecipeError(f"stage {number} ({step.stage.name}): {error}") from None


def _check(step: Step, tokenizer: Any) -> None:
    options = parsed(step.words, step.stage.name)
    if step.stage.kind != "finetune":
        from longrope_export.cli.search import search_config

        config = search_config(options)
        least, most = config.needed_rows
        evaluation_rows(config.data, tokenizer, step.target, most, least=least)
        return
    work = workload(step)
    assert work is not None
    _check_rows(options["data"], options["field"], tokenizer, work.length)


def _check_rows(paths: Sequence[Path], field: str, tokenizer: Any, length: int) -> None:
    from longrope_export.training.data.texts import documents

    longest = 0
    for _, text in documents(paths, field):
        if len(text.encode()) > longest:  # no token is shorter than a byte
            longest = max(longest, len(tokenizer(text, verbose=False)["input_ids"]))
        if longest >= length:
            return
    raise TextTooShortError(
        f"no document has the {length:,} tokens of a row (the longest has {longest:,}); give longer texts"
    )
