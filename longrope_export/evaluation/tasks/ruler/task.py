"""RULER: needles, variable tracking and word counts, scored by the share of references in the generated text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import click

from longrope_export.errors import LongRopeError, TextTooShortError
from longrope_export.evaluation.documents import encode
from longrope_export.evaluation.grid import ratio_entry, ratio_text
from longrope_export.evaluation.prompts import PromptStyle, prompt_style
from longrope_export.evaluation.protocol import Engine, Request, TaskOption, Unit, Value
from longrope_export.evaluation.rows import ModelRow
from longrope_export.evaluation.tasks.retrieval import ids_digest, option
from longrope_export.evaluation.tasks.ruler.counting import common_words_maker, frequent_words_maker
from longrope_export.evaluation.tasks.ruler.draws import Draws
from longrope_export.evaluation.tasks.ruler.niah import SETTINGS, niah_maker
from longrope_export.evaluation.tasks.ruler.samples import Maker, Sample
from longrope_export.evaluation.tasks.ruler.sizing import fitting_sizes, largest_size, sample_of
from longrope_export.evaluation.tasks.ruler.tracking import EXAMPLE_TOKENS, HOPS, make_example, tracking_maker

if TYPE_CHECKING:
    from rich.table import Table

OFFLINE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
WITH_TEXT = tuple(name for name, setting in SETTINGS.items() if setting.haystack == "essay")
SAMPLES = 10


@dataclass(frozen=True, eq=False)
class Question:
    """A sample for a context of `length` tokens, prompt and answer's budget together.

    Its prompt of `tokens` tokens is built when it is needed: hundreds of long ones would fill the memory. `key` names
    the unit, with a hash of the prompt.
    """

    task: str
    length: int
    index: int
    tokens: int
    key: str
    references: tuple[str, ...]
    budget: int
    build: Callable[[], list[int]]


class RulerTask:
    """Scores by task and length, and their mean over the tasks."""

    name = "ruler"
    summary = "RULER's synthetic tasks: needles, variable tracking, word counts"
    options = (
        TaskOption(
            "ruler_tasks",
            f"Comma-separated; {', '.join(WITH_TEXT)} need --data [default: all that can run].",
            None,
            str,
        ),
        TaskOption("ruler_samples", "Samples per task and length (RULER: 500).", SAMPLES, click.IntRange(min=1)),
        TaskOption("ruler_prompt", "Plain text, or the model's chat template.", "base", click.Choice(["base", "chat"])),
    )

    def document_tokens(self, request: Request) -> int:
        """None: haystacks are generated, or made of the words of --data."""
        return 0

    def units(self, request: Request, row: ModelRow) -> list[Unit]:
        """One unit a sample."""
        return [
            Unit(question.key, question.length, question.length, partial(answer, question=question, tokenizer=request.tokenizer))
            for question in questions(request)
        ]  # fmt: skip

    def results(
        self, request: Request, rows: Sequence[ModelRow], values: Mapping[str, Mapping[str, Value]]
    ) -> dict[str, Any]:
        """By row: every task's score by length, and the mean over the tasks."""
        asked = questions(request)
        return {
            "prompt": option(request, "ruler_prompt", "base"),
            "samples": option(request, "ruler_samples", SAMPLES),
            "rows": {row.name: _row(request, asked, values[row.name]) for row in rows},
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Scores by row and length, one table a task."""
        return [_table(task, result) for task in next(iter(result["rows"].values()))["tasks"]]

    def measures(self, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Scores by row, task and length, then the means."""
        for name, row in result["rows"].items():
            for task, found in row["tasks"].items():
                for entry in found["lengths"]:
                    yield {"row": name, "metric": f"RULER {task}", "value": entry["score"], "count": entry["total"],
                           **{key: entry[key] for key in ("low", "high", "length")}}  # fmt: skip
            for length, score in row["average"].items():
                yield {"row": name, "metric": "RULER, mean of the tasks", "value": score, "length": int(length)}


def questions(request: Request) -> list[Question]:
    """All questions of a run; raises `TextTooShortError` for a length without room, naming what it takes."""
    essay = " ".join(text for _, text in request.texts()) if request.data else ""
    style = prompt_style(request.tokenizer, option(request, "ruler_prompt", "base"))
    samples = option(request, "ruler_samples", SAMPLES)
    return [
        question
        for task in chosen_tasks(option(request, "ruler_tasks", ""), bool(essay.strip()))
        for length in request.lengths
        for question in _questions(
            request.tokenizer, task, length, samples, request.seed, style, essay if task in WITH_TEXT else ""
        )
    ]


def chosen_tasks(names: str, has_text: bool) -> list[str]:
    """The tasks called `names`, or all that can run; raises `LongRopeError` for an unknown one, or one without text."""
    possible = [*OFFLINE, *(WITH_TEXT if has_text else ())]
    chosen = [name.strip() for name in names.split(",") if name.strip()] or possible
    for name in chosen:
        if name not in (*OFFLINE, *WITH_TEXT):
            raise LongRopeError(f"--ruler-tasks: there is no {name!r}; choose from {', '.join((*OFFLINE, *WITH_TEXT))}")
        if name not in possible:
            raise LongRopeError(f"--ruler-tasks: {name} hides its needles in a text of yours: give --data")
    return list(dict.fromkeys(chosen))


# Rows share their questions, and a long text takes seconds to tokenise.
@lru_cache(maxsize=256)
def _questions(
    tokenizer: Any, task: str, length: int, samples: int, seed: int, style: PromptStyle, essay: str
) -> tuple[Question, ...]:
    maker, text_seed = make_maker(tokenizer, task, length, seed, essay), f"{task} {length} {seed}"
    room = length - maker.budget
    sizes, needed = fitting_sizes(maker, text_seed, samples, room, lambda s: len(prompt_ids(tokenizer, style, s)))
    if needed is not None:
        raise TextTooShortError(
            f"RULER's {task} needs {needed + maker.budget:,} tokens with this tokenizer, {maker.budget} of them for the "
            f"answer; {length:,} is too short: ask for a longer length or leave {task} out of --ruler-tasks"
        )
    return tuple(
        _question(tokenizer, task, length, style, maker, text_seed, index, size) for index, size in enumerate(sizes)
    )


def _question(
    tokenizer: Any, task: str, length: int, style: PromptStyle, maker: Maker, seed: str, index: int, size: int
) -> Question:
    def build() -> list[int]:
        return prompt_ids(tokenizer, style, sample_of(maker, seed, index, size))

    ids = build()
    key = f"ruler {task} {length} sample {index} {maker.budget} {ids_digest(ids)}"
    references = sample_of(maker, seed, index, size).references
    return Question(task, length, index, len(ids), key, references, maker.budget, build)


def make_maker(tokenizer: Any, task: str, length: int, seed: int, essay: str = "") -> Maker:
    """The maker of `task`'s samples for contexts of `length` tokens."""
    if task == "cwe":
        return common_words_maker(length)
    if task == "fwe":
        return frequent_words_maker(length)
    if task == "vt":
        return tracking_maker(_example(tokenizer, length, seed))
    return niah_maker(SETTINGS[task], tuple(essay.split()))


def _example(tokenizer: Any, length: int, seed: int) -> Any:
    """Variable tracking's solved example: the same for all samples of a length but for its names."""
    most = min(EXAMPLE_TOKENS, length // 8)
    size = largest_size(
        lambda size: len(encode(tokenizer, make_example(Draws(f"vt example {seed}"), size).text)) <= most, HOPS + 1
    )
    return make_example(Draws(f"vt example {seed}"), size or HOPS + 1)


def prompt_ids(tokenizer: Any, style: PromptStyle, sample: Sample) -> list[int]:
    """The prompt's ids: in plain text the lead follows on the same line, in a chat it opens the model's turn."""
    if style.closing is None:
        return [*style.opening, *encode(tokenizer, f"{sample.prompt} {sample.lead}")]
    return [*style.opening, *encode(tokenizer, sample.prompt), *style.closing, *encode(tokenizer, sample.lead)]


def answer(engine: Engine, question: Question, tokenizer: Any) -> Value:
    """The greedy answer and its score."""
    ids = engine.generate(question.build(), question.budget)
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return {"text": text, "score": string_match_all(text, question.references)}


def string_match_all(text: str, references: Sequence[str]) -> float:
    """Share of the references that are in the text, whatever the case, with control characters as line breaks."""
    readable = re.sub(r"[\x00-\x1f]", "\n", text.strip()).strip().lower()
    return sum(reference.lower() in readable for reference in references) / len(references)


def _row(request: Request, asked: Sequence[Question], values: Mapping[str, Value]) -> dict[str, Any]:
    tasks = list(dict.fromkeys(question.task for question in asked))
    found = {task: {"lengths": [_entry(asked, values, task, length) for length in request.lengths]} for task in tasks}
    means = {
        str(length): sum(entry["lengths"][at]["score"] for entry in found.values()) / len(found)
        for at, length in enumerate(request.lengths)
    }
    return {"tasks": found, "average": means}


def _entry(asked: Sequence[Question], values: Mapping[str, Value], task: str, length: int) -> dict[str, Any]:
    here = [question for question in asked if (question.task, question.length) == (task, length)]
    scores = [float(values[question.key]["score"]) for question in here]
    answers = [
        {"tokens": question.tokens, "references": list(question.references), **values[question.key]}
        for question in here
    ]
    return {"length": length, "samples": len(here), **ratio_entry(sum(scores), len(here)), "answers": answers}


def _table(task: str, result: Mapping[str, Any]) -> Table:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=f"RULER {task}")
    drawn.add_column("factors")
    entries = next(iter(result["rows"].values()))["tasks"][task]["lengths"]
    for entry in entries:
        drawn.add_column(f"{entry['length']:,}", justify="right")
    for name, row in result["rows"].items():
        cells = [ratio_text(entry["correct"], entry["total"]) for entry in row["tasks"][task]["lengths"]]
        drawn.add_row(Text(name), *cells)
    return drawn


TASK = RulerTask()
