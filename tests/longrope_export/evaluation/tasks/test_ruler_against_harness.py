"""RULER's samples are those of lm-evaluation-harness for the same seeds, but for the differences that the docs list.

The default suite compares with hashes of what the harness gave (lm_eval 0.4.13); with lm_eval installed the slow test
asks the harness itself. `python tests/longrope_export/evaluation/tasks/test_ruler_against_harness.py` writes the hashes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longrope_export.evaluation.tasks.ruler.counting import common_words_sample, frequent_words_sample
from longrope_export.evaluation.tasks.ruler.draws import Draws
from longrope_export.evaluation.tasks.ruler.niah import SETTINGS, niah_sample
from longrope_export.evaluation.tasks.ruler.samples import Sample
from longrope_export.evaluation.tasks.ruler.tracking import make_example, tracking_sample

HASHES = Path(__file__).with_name("harness_samples.json")
HELPER = Path(__file__).parents[3] / "helpers" / "harness_samples.py"
SEED, SIZE = 7, 60
ESSAY = 'It was late. "Who is there?" he asked. Nobody answered! The wind (it was March) blew on. '
TASKS = [*SETTINGS, "vt", "cwe", "fwe"]


def ours(task: str, seed: int = SEED, size: int = SIZE) -> Sample:
    """Our sample of one stream of draws, as the harness draws."""
    draws = Draws(seed)
    if task == "vt":
        return tracking_sample(draws, size, example=make_example(Draws(1), 5))
    if task == "cwe":
        return common_words_sample(draws, size, long=True)
    if task == "fwe":
        return frequent_words_sample(draws, size, vocabulary=40)
    essay = tuple((ESSAY * 20).split())
    return niah_sample(draws, size, setting=SETTINGS[task], essay=essay)


def comparable(task: str, prompt: str, lead: str, references: Any) -> list[Any]:
    """Without what differs on purpose: vt's example, line breaks and the harness' misspelling; cwe's example."""
    if task == "vt":
        prompt = " ".join(prompt[prompt.rindex("Memorize and track") :].split())
        lead = lead.replace("assgined", "assigned")
    if task == "cwe":
        prompt = prompt[prompt.rindex("Below is a numbered list") :]
    return [prompt, lead, list(references)]


def digest(sample: list[Any]) -> str:
    return hashlib.sha256(json.dumps(sample).encode()).hexdigest()


def harness() -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(HELPER), str(SEED), str(SIZE), ESSAY * 20]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_harness_sample(task: str) -> None:
    sample = ours(task)
    expected = json.loads(HASHES.read_text())
    assert digest(comparable(task, sample.prompt, sample.lead, sample.references)) == expected[task]


@pytest.mark.parametrize("task", TASKS)
def test_another_seed_or_size_gives_another_sample(task: str) -> None:
    samples = [ours(task), ours(task, seed=8), ours(task, size=SIZE + 1 if task != "fwe" else 2 * SIZE)]
    assert len({digest(comparable(task, s.prompt, s.lead, s.references)) for s in samples}) == 3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install '.[eval]'")
def test_the_harness_itself_gives_the_same_samples() -> None:
    found = harness()
    for task in TASKS:
        sample = ours(task)
        mine = comparable(task, sample.prompt, sample.lead, sample.references)
        assert mine == comparable(task, *found[task]), task
    solved = ours("cwe").prompt[: ours("cwe").prompt.rindex("\nBelow is a numbered list")]
    # The harness joins lead and answer of the example without a space.
    assert solved.replace("the list are: 1.", "the list are:1.") == found["cwe example"]


if __name__ == "__main__":
    samples = harness()
    hashes = {task: digest(comparable(task, *samples[task])) for task in TASKS}
    HASHES.write_text(json.dumps(hashes, indent=1) + "\n")
