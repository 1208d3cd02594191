"""Needle perplexity scores the answer's tokens, and they are scored because of the needle."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from retrieval_runs import demo_engine, demo_request, demo_rows, run_task

from longrope_export.errors import TextTooShortError
from longrope_export.evaluation.registry import load_task
from longrope_export.evaluation.tasks.needle import needle_rows
from longrope_export.evaluation.tasks.needle_perplexity import answer_losses

TASK = load_task("needle-perplexity")
OPTIONS = {"needle_perplexity_trials": 3, "needle_perplexity_template": "passkey"}


@pytest.fixture(scope="module")
def entry() -> Any:
    result = run_task(TASK, demo_request(256, **OPTIONS))
    json.dumps(result)
    assert list(TASK.measures(result))
    assert TASK.tables(result)
    return result["rows"]["unchanged"]["lengths"][0]


def test_a_model_that_retrieves_knows_the_answer_with_the_needle_and_guesses_without(entry: Any) -> None:
    assert entry["perplexity"] < 1.5
    assert entry["without"] > 3.0
    assert (entry["unseen"], entry["trials"]) == (0, 3)
    assert entry["low"] <= entry["perplexity"] <= entry["high"]


def test_all_tokens_of_all_answers_are_scored_and_no_others(entry: Any) -> None:
    rows = needle_rows(demo_request(256), [1 / 6, 0.5, 5 / 6], "passkey")
    assert entry["tokens"] == sum(row.answer_tokens for row in rows) >= 15
    losses = [demo_engine().losses(row.token_ids)[-row.answer_tokens :] for row in rows]
    assert entry["perplexity"] == pytest.approx(math.exp(float(np.concatenate(losses).mean())), rel=1e-4)


def test_the_answers_tokens_are_those_of_the_key() -> None:
    for row in needle_rows(demo_request(256), [0.5], "magic"):
        answer = demo_request(256).tokenizer.decode(row.token_ids[len(row.token_ids) - row.answer_tokens :].tolist())
        assert answer.strip() == str(row.key)


def test_an_answer_that_was_cut_off_is_an_error() -> None:
    class Cut:
        """The demo model behind a limit of tokens, as a truncation would have it."""

        def losses(self, token_ids: Any, first: int = 1) -> Any:
            return demo_engine().losses(token_ids[:-2], first)

    row = needle_rows(demo_request(256), [0.5], "passkey")[0]
    assert len(answer_losses(demo_engine(), row)) == row.answer_tokens
    with pytest.raises(TextTooShortError, match="the row was cut"):
        answer_losses(Cut(), row)  # type: ignore[arg-type]


def test_a_model_that_cannot_see_the_needle_is_counted() -> None:
    class Blind:
        """A model with a short memory: it forgets all but the last 12 tokens."""

        def losses(self, token_ids: Any, first: int = 1) -> Any:
            return demo_engine().losses(token_ids[-12:], first - len(token_ids) + 12)

    request = demo_request(256, **OPTIONS)
    result = run_task(TASK, request, Blind())  # type: ignore[arg-type]
    assert result["rows"]["unchanged"]["lengths"][0]["unseen"] == 3


def test_depths_are_stratified_over_documents_and_options_matter() -> None:
    request = demo_request(256, **OPTIONS)
    result = run_task(TASK, request, _Noughts())  # type: ignore[arg-type]
    assert result["depths"] == pytest.approx([1 / 6, 0.5, 5 / 6])
    keys = [unit.key for unit in TASK.units(request, demo_rows()[0])]
    for options in ({"needle_perplexity_trials": 2}, {"needle_perplexity_template": "magic"}):
        changed = [unit.key for unit in TASK.units(demo_request(256, **{**OPTIONS, **options}), demo_rows()[0])]
        assert not set(keys) & set(changed)


class _Noughts:
    """Losses of nought: only what surrounds them is looked at."""

    def losses(self, token_ids: Any, first: int = 1) -> Any:
        return np.zeros(len(token_ids) - first, dtype=np.float32)


def test_other_factors_are_compared_pairwise_with_the_first_row() -> None:
    options = {**OPTIONS, "needle_perplexity_trials": 2}
    result = run_task(TASK, demo_request(512, **options), None, "unchanged", "yarn")
    first, second = (result["rows"][name]["lengths"][0] for name in ("unchanged", "yarn"))
    assert first["difference"] is None
    assert second["difference"]["ratio"] == pytest.approx(second["perplexity"] / first["perplexity"], rel=1e-6)
    assert second["perplexity"] < first["perplexity"]
