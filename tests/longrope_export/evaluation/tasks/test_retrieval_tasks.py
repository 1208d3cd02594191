"""Passkey and needle on a model that retrieves; each option and each part of the scoring matters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from retrieval_runs import demo_engine, demo_request, demo_rows, run_task

from longrope_export.evaluation.needles import needle_row
from longrope_export.evaluation.passkey import PasskeyPrompt
from longrope_export.evaluation.registry import load_task
from longrope_export.evaluation.tasks import needle, passkey
from longrope_export.evaluation.tasks.retrieval import forced, generated

PASSKEYS, NEEDLES = load_task("passkey"), load_task("needle")
# Two needles a length, one forward pass each.
QUICK = {"needle_depths": 2, "needle_trials": 1, "needle_template": "passkey", "needle_mode": "forced"}


def row(result: Any, name: str = "unchanged") -> Any:
    return result["rows"][name]


@pytest.fixture(scope="module")
def found() -> Any:
    return run_task(PASSKEYS, demo_request(256, trials=3))


def test_the_demo_model_finds_every_passkey_in_its_window_in_both_ways(found: Any) -> None:
    for way in ("forced", "generated"):
        grid = row(found)[way]
        assert (grid["correct"], grid["total"]) == ([[1, 1, 1]], [[1, 1, 1]])
        assert grid["depths"] == pytest.approx([1 / 6, 1 / 2, 5 / 6])
    assert [trial["text"].strip().startswith(str(trial["key"])) for trial in row(found)["trials"]] == [True] * 3
    json.dumps(found)


def test_beyond_the_window_factors_decide() -> None:
    result = run_task(PASSKEYS, demo_request(512, trials=4, passkey_mode="forced"), None, "unchanged", "yarn")
    accuracy = [row(result, name)["forced"]["accuracy"]["512"] for name in ("unchanged", "yarn")]
    assert accuracy[0] < accuracy[1] == 1.0
    assert row(result)["generated"] is None


def test_the_demo_model_finds_a_needle_in_real_text_in_both_ways() -> None:
    result = run_task(NEEDLES, demo_request(256, **{**QUICK, "needle_mode": "both"}))
    assert [row(result)[way]["correct"] for way in ("forced", "generated")] == [[[1, 1]], [[1, 1]]]
    assert result["documents"] == [document.name for document in demo_request(256).documents]


def test_a_needle_that_is_not_there_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        needle, "needle_row", lambda *args, **options: needle_row(*args, **{**options, "hidden": False})
    )
    assert row(run_task(NEEDLES, demo_request(256, **QUICK)))["forced"]["correct"] == [[0, 0]]


class Shifted:
    """The demo model, its choices reported one place late."""

    def choices(self, token_ids: Sequence[int], first: int) -> Any:
        return np.roll(demo_engine().choices(token_ids, first), 1)


class Short:
    """The demo model, the last choice missing."""

    def choices(self, token_ids: Sequence[int], first: int) -> Any:
        return demo_engine().choices(token_ids, first)[:-1]


def a_prompt() -> PasskeyPrompt:
    return passkey.prompts(demo_request(256, trials=1))[0]


def test_scoring_one_place_off_or_a_cut_answer_does_not_pass() -> None:
    request = demo_request(256)
    assert forced(demo_engine(), a_prompt(), request.tokenizer) == {"right": True}
    assert forced(Shifted(), a_prompt(), request.tokenizer) == {"right": False}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="argument 2 is longer"):
        forced(Short(), a_prompt(), request.tokenizer)  # type: ignore[arg-type]


def test_a_wrong_key_is_wrong_in_both_ways() -> None:
    request, prompt = demo_request(256), a_prompt()
    digit = request.tokenizer.convert_tokens_to_ids("7")
    ids = tuple(digit if index == 1 and token != digit else token for index, token in enumerate(prompt.answer_ids))
    other = PasskeyPrompt(prompt.prompt_ids, ids, prompt.key + 1, prompt.depth)
    assert forced(demo_engine(), other, request.tokenizer)["right"] is (ids == prompt.answer_ids)
    answer = generated(demo_engine(), other, request.tokenizer)
    assert (answer["right"], answer["text"].strip().startswith(str(prompt.key))) == (False, True)


def keys(task: Any, request: Any) -> list[str]:
    return [unit.key for unit in task.units(request, demo_rows()[0])]


@pytest.mark.parametrize(
    ("options", "units"),
    [
        ({"trials": 6}, 12),
        ({"passkey_mode": "forced"}, 3),
        ({"passkey_mode": "generate"}, 3),
        ({"passkey_depths": 1}, 6),
    ],
    ids=str,
)
def test_every_passkey_option_changes_what_is_asked(options: dict[str, Any], units: int) -> None:
    plain = keys(PASSKEYS, demo_request(256, trials=3))
    changed = keys(PASSKEYS, demo_request(256, **{"trials": 3, **options}))
    assert len(set(changed)) == len(changed) == units
    assert changed != plain


def test_depths_repeat_when_there_are_fewer_than_trials() -> None:
    prompts = passkey.prompts(demo_request(256, trials=5, passkey_depths=2))
    assert [prompt.depth for prompt in prompts] == [0.25, 0.75, 0.25, 0.75, 0.25]


@pytest.mark.parametrize(
    "options",
    [{"needle_depths": 3}, {"needle_trials": 2}, {"needle_template": "magic"}, {"needle_mode": "generate"}],
    ids=str,
)
def test_every_needle_option_changes_what_is_asked(options: dict[str, Any]) -> None:
    plain, changed = (keys(NEEDLES, demo_request(256, **{**QUICK, **more})) for more in ({}, options))
    assert plain != changed
    assert len(set(changed)) == len(changed)


def test_the_seed_decides_the_keys_and_the_length_the_factors() -> None:
    for task in (PASSKEYS, NEEDLES):
        assert not set(keys(task, demo_request(256))) & set(keys(task, demo_request(256, seed=1)))
        assert {unit.length for unit in task.units(demo_request(256, 300), demo_rows()[0])} == {256, 300}


def test_unit_keys_are_the_same_for_the_same_question() -> None:
    """A journal is read with them."""
    assert keys(NEEDLES, demo_request(256)) == keys(NEEDLES, demo_request(256))


def test_measures_and_tables_are_made(found: Any) -> None:
    lines = list(PASSKEYS.measures(found))
    assert {line["metric"] for line in lines} == {"accuracy, teacher-forced", "accuracy, generated"}
    assert len(PASSKEYS.tables(found)) == 1
