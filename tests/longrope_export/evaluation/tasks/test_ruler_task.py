"""RULER as a task: prompts that fill their length, scores of what was generated, options that matter."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from retrieval_runs import demo_request, demo_rows, demo_tokenizer, run_task

from longrope_export.errors import InputFileError, LongRopeError, MissingDependencyError, TextTooShortError
from longrope_export.evaluation.documents import encode
from longrope_export.evaluation.prompts import PromptStyle, base_style
from longrope_export.evaluation.registry import load_task
from longrope_export.evaluation.tasks.ruler import words
from longrope_export.evaluation.tasks.ruler.sizing import fitting_sizes, largest_size, sample_of
from longrope_export.evaluation.tasks.ruler.task import (
    OFFLINE,
    WITH_TEXT,
    Question,
    _questions,
    answer,
    chosen_tasks,
    make_maker,
    prompt_ids,
    questions,
    string_match_all,
)
from longrope_export.evaluation.tasks.ruler.templates import NOISE

TASK = load_task("ruler")
BUDGETS = {**dict.fromkeys((*OFFLINE, *WITH_TEXT), 128), "vt": 30, "cwe": 120, "fwe": 50}
LENGTH = 2_048


class Reader:
    """An engine that answers as somebody who reads the prompt: it looks the asked key up."""

    runtime = "transformers"
    tokenizer = demo_tokenizer()

    def generate(self, prompt_ids: Sequence[int], count: int) -> list[int]:
        text = self.tokenizer.decode(list(prompt_ids), skip_special_tokens=True)
        named = re.search(r"for (\S+) mentioned in the provided text is$", text)
        found = re.search(rf"for {re.escape(named.group(1))} is: (\S+)\.", text) if named else None
        return encode(self.tokenizer, f" {found.group(1)}." if found else " ?")[:count]


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("It was the best of times. It was the worst of times! " * 40)
    return path


@pytest.mark.parametrize("task", [*OFFLINE, *WITH_TEXT])
def test_prompts_fill_their_length_and_leave_the_budget_free(task: str, book: Path) -> None:
    request = demo_request(LENGTH, data=[book], ruler_tasks=task, ruler_samples=2)
    made = questions(request)
    assert [question.budget for question in made] == [BUDGETS[task]] * 2
    for question in made:
        assert len(question.build()) == question.tokens
        assert question.build()[0] == demo_tokenizer().bos_token_id
        assert question.tokens + question.budget <= LENGTH
        assert question.tokens + question.budget > (0.8 if task == "fwe" else 0.93) * LENGTH
    units = TASK.units(request, demo_rows()[0])
    assert [unit.length for unit in units] == [LENGTH] * 2


def test_haystacks_are_as_large_as_fit() -> None:
    maker = make_maker(demo_tokenizer(), "niah_single_1", LENGTH, 0)

    def tokens(sample: Any) -> int:
        return len(prompt_ids(demo_tokenizer(), base_style(demo_tokenizer()), sample))

    sizes, _ = fitting_sizes(maker, "s", 1, LENGTH - 128, tokens)
    noise = len(encode(demo_tokenizer(), f"\n{NOISE}"))
    assert LENGTH - 128 - noise < tokens(sample_of(maker, "s", 0, sizes[0])) <= LENGTH - 128


@pytest.mark.parametrize("limit", [1, 2, 3, 17, 64, 1000])
def test_binary_search_finds_the_largest_size(limit: int) -> None:
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= limit

    assert largest_size(fits, 1) == limit
    assert len(asked) <= 25
    assert largest_size(fits, 1, most=40) == min(limit, 40)
    assert largest_size(lambda size: False, 1) is None


def test_samples_are_fixed_by_seed_and_number_alone() -> None:
    def made(samples: int, seed: int = 0) -> list[Question]:
        return questions(demo_request(1024, seed=seed, ruler_tasks="niah_multikey_3,vt", ruler_samples=samples))

    five, two = made(5), made(2)
    assert [q.key for q in five if q.index < 2] == [q.key for q in two]
    assert len({q.key for q in five}) == 10
    assert not {q.key for q in two} & {q.key for q in made(2, seed=1)}


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe"])
def test_a_length_without_room_is_refused_with_what_it_takes(task: str) -> None:
    with pytest.raises(TextTooShortError, match=rf"{task} needs .* is too short") as caught:
        questions(demo_request(150, ruler_tasks=task))
    needed = int(str(caught.value).split("needs ")[1].split()[0].replace(",", ""))
    assert questions(demo_request(needed + 60, ruler_tasks=task, ruler_samples=1))
    with pytest.raises(TextTooShortError):
        questions(demo_request(needed - 60, ruler_tasks=task, ruler_samples=1))


def test_tasks_that_need_a_text_run_with_one_and_are_refused_without(book: Path) -> None:
    assert chosen_tasks("", False) == list(OFFLINE)
    assert chosen_tasks("", True) == [*OFFLINE, *WITH_TEXT]
    assert chosen_tasks(" vt, vt,cwe", False) == ["vt", "cwe"]
    with pytest.raises(LongRopeError, match="niah_single_2 hides its needles in a text of yours: give --data"):
        questions(demo_request(1024, ruler_tasks="niah_single_2"))
    with pytest.raises(LongRopeError, match="there is no 'qa_1'; choose from niah_single_1"):
        questions(demo_request(1024, ruler_tasks="qa_1"))
    text = demo_tokenizer().decode(
        questions(demo_request(1024, data=[book], ruler_tasks="niah_single_2", ruler_samples=1))[0].build()
    )
    assert "the worst of times!" in text
    with pytest.raises(InputFileError):
        questions(demo_request(1024, data=[book.with_name("missing")], ruler_tasks="niah_single_2"))


@pytest.mark.parametrize(
    ("text", "references", "score"),
    [
        (" 1234567 and", ("1234567",), 1.0),
        ("123456", ("1234567",), 0.0),
        ("apple-PIE\x07 tree", ("Apple-Pie", "tree", "wood", "bird"), 0.5),
        ("AB\x01CD", ("ABCD", "ab"), 0.5),
        ("", ("x",), 0.0),
    ],
)
def test_the_score_is_the_share_of_references_in_the_text(text: str, references: tuple[str, ...], score: float) -> None:
    assert string_match_all(text, references) == score


def test_scores_are_those_of_the_generated_text() -> None:
    request = demo_request(1024, ruler_tasks="niah_single_1,niah_multikey_2,vt", ruler_samples=3)
    result = run_task(TASK, request, Reader())  # type: ignore[arg-type]
    json.dumps(result)
    tasks = result["rows"]["unchanged"]["tasks"]
    entries = {task: found["lengths"][0] for task, found in tasks.items()}
    assert {task: entry["score"] for task, entry in entries.items()} == {
        "niah_single_1": 1.0,
        "niah_multikey_2": 1.0,
        "vt": 0.0,
    }
    assert result["rows"]["unchanged"]["average"] == {"1024": pytest.approx(2 / 3)}
    entry = entries["niah_single_1"]
    assert (entry["samples"], entry["correct"], entry["total"]) == (3, 3.0, 3)
    assert (entry["low"], entry["high"]) == pytest.approx((0.4385, 1.0), abs=1e-4)
    assert entry["answers"][0]["references"][0] in entry["answers"][0]["text"]
    assert len(TASK.tables(result)) == 3
    assert {line["metric"] for line in TASK.measures(result)} == {
        "RULER niah_single_1", "RULER niah_multikey_2", "RULER vt", "RULER, mean of the tasks",
    }  # fmt: skip


def test_a_reader_whose_needle_was_removed_or_whose_answer_is_cut_scores_nothing() -> None:
    question = questions(demo_request(1024, ruler_tasks="niah_single_1", ruler_samples=1))[0]
    assert answer(Reader(), question, demo_tokenizer())["score"] == 1.0  # type: ignore[arg-type]
    text = demo_tokenizer().decode(question.build()[1:])
    without = encode(demo_tokenizer(), text.replace(f"is: {question.references[0]}.", "is gone."))
    assert answer(Reader(), _changed(question, build=lambda: without), demo_tokenizer())["score"] == 0.0  # type: ignore[arg-type]
    assert answer(Reader(), _changed(question, budget=2), demo_tokenizer())["score"] == 0.0  # type: ignore[arg-type]


def _changed(question: Question, **changes: Any) -> Question:
    return Question(**{**vars(question), **changes})


def test_chat_puts_the_lead_into_the_models_turn_and_keeps_the_length() -> None:
    tokenizer = demo_tokenizer()
    plain, chat = (
        _questions(tokenizer, "niah_single_1", 1024, 1, 0, style, "")[0]
        for style in (base_style(tokenizer), PromptStyle((1, 5, 6), (7, 8)))
    )
    lead = tokenizer.decode(plain.build()).rsplit("provided text? ", 1)[1]
    assert lead.startswith("The special magic number for ")
    ending = (7, 8, *encode(tokenizer, lead))
    assert tuple(chat.build()[-len(ending) :]) == ending
    assert chat.build()[:3] == [1, 5, 6]
    assert chat.tokens + chat.budget <= 1024


def test_without_the_word_lists_the_tasks_that_need_them_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words.importlib.util, "find_spec", lambda name: None)
    words.adjective_nouns.cache_clear()
    with pytest.raises(MissingDependencyError, match="wonderwords: pip install"):
        words.adjective_nouns()
    assert questions(demo_request(1024, seed=9, ruler_tasks="niah_multikey_3,vt,fwe", ruler_samples=1))
