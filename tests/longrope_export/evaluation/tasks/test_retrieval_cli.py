"""`longrope eval` with the tasks of retrieval: options reach them, results are written, what is wrong is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from retrieval_runs import demo_model_path

from longrope_export.cli.evaluate import evaluate
from longrope_export.errors import LongRopeError, TextTooShortError


def run(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, list(map(str, [demo_model_path(), *arguments])), catch_exceptions=False)


def test_one_run_of_several_tasks_is_written_and_not_repeated(tmp_path: Path) -> None:
    command = (
        "--tasks", "passkey,needle,needle-perplexity", "--lengths", "256", "--documents", "1", "--seed", "5",
        "--trials", "2", "--passkey-depths", "1", "--passkey-mode", "forced", "--needle-depths", "2",
        "--needle-trials", "1", "--needle-template", "passkey", "--needle-mode", "forced",
        "--needle-perplexity-trials", "1", "--needle-perplexity-template", "passkey", "--out", tmp_path / "out", "--json",
    )  # fmt: skip
    first = run(*command)
    assert first.exit_code == 0, first.output
    tasks = json.loads(first.stdout)["tasks"]
    rows = {name: result["rows"]["unchanged"] for name, result in tasks.items()}
    assert (rows["passkey"]["forced"]["depths"], rows["passkey"]["forced"]["total"]) == ([0.5], [[2]])
    assert rows["needle"]["forced"]["correct"] == [[1, 1]]
    assert rows["needle-perplexity"]["lengths"][0]["trials"] == 1
    lines = list(csv.DictReader((tmp_path / "out" / "measures.csv").read_text().splitlines()))
    assert {line["task"] for line in lines} == {"passkey", "needle", "needle-perplexity"}
    journal = (tmp_path / "out" / "journal.jsonl").read_bytes()
    assert json.loads(run(*command).stdout)["tasks"] == tasks
    assert (tmp_path / "out" / "journal.jsonl").read_bytes() == journal


REFUSED = [
    (["--tasks", "ruler", "--lengths", "200", "--ruler-tasks", "vt"], TextTooShortError, "vt needs"),
    (["--tasks", "ruler", "--ruler-tasks", "niah_single_2", "--lengths", "1k"], LongRopeError, "give --data"),
    (["--tasks", "passkey", "--lengths", "256", "--passkey-prompt", "chat"], LongRopeError, "no chat template"),
    (["--tasks", "needle", "--lengths", "256", "--needle-prompt", "chat"], LongRopeError, "no chat template"),
    (["--tasks", "ruler", "--lengths", "1k", "--ruler-prompt", "chat"], LongRopeError, "no chat template"),
    (
        ["--tasks", "passkey", "--lengths", "256", "--ruler-samples", "3"],
        LongRopeError,
        "--ruler-samples belongs to none",
    ),
    (
        ["--tasks", "passkey", "--lengths", "256", "--lm-eval-limit", "3"],
        LongRopeError,
        "--lm-eval-limit belongs to none",
    ),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[" ".join(entry[0][1:4]) for entry in REFUSED])
def test_what_does_not_fit_is_refused(options: list[str], error: type[LongRopeError], message: str) -> None:
    with pytest.raises(error, match=message):
        run(*options)


@pytest.mark.parametrize("option", ["--passkey-prompt", "--needle-mode", "--needle-template", "--ruler-prompt"])
def test_choices_are_checked(option: str) -> None:
    assert run("--lengths", "256", option, "anything").exit_code == 2
