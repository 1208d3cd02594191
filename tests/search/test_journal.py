"""The journal: torn lines, other searches, edited entries, two processes; and the evaluator that relies on it."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from full_disk import can_mount, on_small_disk

from longrope_export.errors import InputFileError, OutputError, StaleStateError
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.journal import Journal
from longrope_export.search.protocol import SEARCH, Outcome, Pass, Trial
from longrope_export.search.space import Candidate

HEADER = {
    "model": "abc",
    "seed": 0,
    "configuration": {"budget": "4", "gradient": {"learning_rate": 0.1}},
    "plan": {"steps": 3},
}


def _trial(value: float, document: int = 0, gradient: bool = False) -> Trial:
    return Trial(Candidate((1.0, value)), SEARCH, document, gradient)


def _written(path: Path) -> Path:
    with Journal(path) as journal:
        journal.begin(HEADER)
        journal.append(0, _trial(2.0), Outcome(0.1 + 0.2), 1.0)
        journal.append(1, _trial(3.0, gradient=True), Outcome(1.5, (1e-17, -2.0, math.pi)), 1.0)
        journal.append(2, _trial(4.0), Outcome(math.inf), 1.0)
    return path


def test_what_was_appended_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    with Journal(_written(tmp_path / "journal.jsonl")) as journal:
        assert journal.recorded(0, _trial(2.0)) == Outcome(0.1 + 0.2)
        assert journal.recorded(1, _trial(3.0, gradient=True)) == Outcome(1.5, (1e-17, -2.0, math.pi))
        assert journal.recorded(2, _trial(4.0)) == Outcome(math.inf)
        assert journal.recorded(3, _trial(5.0)) is None


def test_a_file_torn_at_any_byte_opens_with_its_whole_lines_and_can_be_appended_to(tmp_path: Path) -> None:
    data = _written(tmp_path / "journal.jsonl").read_bytes()
    torn = tmp_path / "torn.jsonl"
    for size in range(len(data)):
        torn.write_bytes(data[:size])
        lines = data[:size].count(b"\n")
        with Journal(torn) as journal:
            assert len(journal.entries) == max(0, lines - 1)
            assert (journal.header is None) == (lines == 0)
            if lines == 0:
                journal.begin(HEADER)
            if size % 5:  # each append waits for the disk
                continue
            journal.append(7, _trial(9.0), Outcome(1.0), 1.0)
        with Journal(torn) as journal:
            assert journal.recorded(7, _trial(9.0)) == Outcome(1.0)
            assert len(journal.entries) == max(0, lines - 1) + 1


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model", {"model": "abd"}),
        ("seed", {"seed": 1}),
        ("configuration.budget", {"configuration": {"budget": "5", "gradient": {"learning_rate": 0.1}}}),
        (
            "configuration.gradient.learning_rate",
            {"configuration": {"budget": "4", "gradient": {"learning_rate": 0.2}}},
        ),
        ("extra", {"extra": 1}),
    ],
)
def test_another_header_is_refused_by_the_field_s_name(tmp_path: Path, field: str, change: dict[str, object]) -> None:
    with Journal(_written(tmp_path / "journal.jsonl")) as journal:
        journal.check(HEADER)
        journal.check({**HEADER, "plan": {"steps": 4}})
        with pytest.raises(StaleStateError, match=f": {field} is "):
            journal.check({**HEADER, **change})


def test_an_entry_of_another_trial_is_refused(tmp_path: Path) -> None:
    with Journal(_written(tmp_path / "journal.jsonl")) as journal:
        for other in (_trial(2.5), _trial(2.0, document=1), _trial(2.0, gradient=True)):
            with pytest.raises(StaleStateError, match="trial 0 is not the one"):
                journal.recorded(0, other)


@pytest.mark.parametrize(
    "text", ["{}\n", "[]\n", "nonsense\n", '{"format": "other"}\n', '{"format":"longrope-search-journal/1"}\n[1]\n']
)
def test_a_file_that_is_no_journal_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_text(text)
    with pytest.raises(InputFileError, match="not a search journal"):
        Journal(path)
    assert path.read_text() == text


@pytest.mark.skipif(os.name == "nt", reason="files are not locked on Windows")
def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = _written(tmp_path / "journal.jsonl")
    code = "import sys, pathlib, longrope_export.search.journal as j; j.Journal(pathlib.Path(sys.argv[1]))"
    with Journal(path):
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert "another search is writing it" in other.stderr
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0


def test_a_folder_that_is_missing_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be opened"):
        Journal(tmp_path / "missing" / "journal.jsonl")


class Counting:
    """An executor that gives λ as the loss, in reverse order, and remembers what it ran."""

    def __init__(self) -> None:
        self.ran: list[Trial] = []

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        for index in reversed(range(len(passes))):
            self.ran += passes[index]
            yield index, [Outcome(trial.candidate.factors[1] + trial.document) for trial in passes[index]]


def test_each_trial_is_measured_once_in_a_search_and_never_again_from_a_journal(tmp_path: Path) -> None:
    asked = [[_trial(2.0), _trial(3.0)], [_trial(3.0), _trial(4.0), _trial(4.0)]]
    counts = []
    for _ in range(2):
        executor = Counting()
        with Journal(tmp_path / "journal.jsonl") as journal:
            if journal.header is None:
                journal.begin(HEADER)
            evaluator = Evaluator(executor, {SEARCH: 1}, journal)
            losses = [[outcome.loss for outcome in evaluator.evaluate(trials)] for trials in asked]
        assert losses == [[2.0, 3.0], [3.0, 4.0, 4.0]]
        assert evaluator.asked == {(SEARCH, False): 3}
        counts.append(len(executor.ran))
    assert counts == [3, 0]


def test_a_lost_line_in_the_middle_is_measured_again_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    trials = [_trial(2.0), _trial(3.0), _trial(4.0)]
    with Journal(path) as journal:
        journal.begin(HEADER)
        Evaluator(Counting(), {SEARCH: 1}, journal).evaluate(trials)
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["trial"] for line in lines[1:]] == [2, 1, 0]
    path.write_text("".join([lines[0], lines[1], lines[3]]))
    executor = Counting()
    with Journal(path) as journal:
        outcomes = Evaluator(executor, {SEARCH: 1}, journal).evaluate(trials)
    assert [outcome.loss for outcome in outcomes] == [2.0, 3.0, 4.0]
    assert executor.ran == [trials[1]]


def test_mean_losses_are_of_the_first_documents_asked_for() -> None:
    evaluator = Evaluator(Counting(), {SEARCH: 3})
    candidates = [Candidate((1.0, 2.0)), Candidate((1.0, 5.0))]
    assert evaluator.mean_losses(candidates, SEARCH) == [3.0, 6.0]
    assert evaluator.mean_losses(candidates, SEARCH, 1) == [2.0, 5.0]


_FILLING = """
from longrope_export.errors import OutputError
from longrope_export.search.journal import Journal
from longrope_export.search.protocol import Outcome, Trial
from longrope_export.search.space import Candidate

appended = 0
try:
    with Journal(disk / "journal.jsonl") as journal:
        journal.begin({"model": "abc"})
        while True:
            journal.append(appended, Trial(Candidate((1.0, 2.0)), "search", 0), Outcome(1.5), 1.0)
            appended += 1
except OutputError as error:
    print(error)
with Journal(disk / "journal.jsonl") as journal:
    print(sorted(journal.entries) == list(range(appended)), appended > 10)
"""


def test_a_full_disk_keeps_every_loss_that_was_appended(tmp_path: Path) -> None:
    done = on_small_disk(tmp_path, 16 * 1024, script=_FILLING)
    assert (done.code, done.errors, done.left) == (0, [], ["journal.jsonl"])
    message, outcome = done.printed.splitlines()
    assert message.endswith("what it holds is kept: run again")
    assert ("No space left on device" if can_mount() else "File too large") in message
    assert outcome == "True True"
