"""`lm-eval:NAME` hands a task to lm-evaluation-harness: the same answers as the harness' own model class gives."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from retrieval_runs import demo_engine, demo_request, demo_rows, demo_tokenizer, run_task

from longrope_export.errors import InputFileError, LongRopeError, MissingDependencyError
from longrope_export.evaluation.registry import load_task

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = [
    pytest.mark.slow,
    pytest.mark.skipif(not INSTALLED, reason="needs lm_eval: pip install '.[eval]'"),
    pytest.mark.filterwarnings("ignore"),
]

CHOICES = """
task: local_choices
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WORDS = """
task: local_words
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
"""
QUESTIONS = [
    {"question": "import os\\nimport", "choices": [" sys", " kitchen"], "answer": 0},
    {"question": "def main(self,", "choices": [" purple", " args"], "answer": 1},
    {"question": "for i in", "choices": [" range", " whale"], "answer": 0},
    {"question": "class Error(", "choices": ["Exception", "banana"], "answer": 1},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    data = folder / "questions.jsonl"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "choices.yaml").write_text(CHOICES % data)
    (folder / "words.yaml").write_text(WORDS % data)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    if INSTALLED:
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))


class Rotating:
    """The demo model's engine, with the lengths for which it was rotated."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def rotate(self, row: Any, factors: Any, length: int) -> None:
        self.lengths.append(length)

    def __getattr__(self, name: str) -> Any:
        return getattr(demo_engine(), name)


def evaluated(folder: Path, name: str, **options: Any) -> Any:
    request = demo_request(256, lm_eval_include=folder, **options)
    return run_task(load_task(f"lm-eval:{name}"), request, Rotating())["rows"]["unchanged"]  # type: ignore[arg-type]


def own_class(folder: Path, name: str) -> Any:
    """What the harness' HFLM answers with the same model and tokenizer."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=demo_engine().model, tokenizer=demo_tokenizer(), add_bos_token=True, max_length=256)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=[name], task_manager=manager)["results"][name]


@pytest.mark.parametrize("name", ["local_choices", "local_words"])
@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_harness)], ids=[""])
def test_metrics_are_those_of_the_harness_own_class(folder: Path, name: str, mark: None) -> None:
    found = evaluated(folder, name)["tasks"][name]
    expected = own_class(folder, name)
    assert found["questions"] == len(QUESTIONS)
    for metric, entry in found["metrics"].items():
        assert entry["value"] == pytest.approx(expected[f"{metric},none"]), metric
    assert set(found["metrics"]) >= ({"acc", "acc_norm"} if name == "local_choices" else {"exact_match"})


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_harness)], ids=[""])
def test_the_models_answers_decide_and_options_matter(folder: Path, mark: None) -> None:
    task = load_task("lm-eval:local_choices")
    result = run_task(task, demo_request(256, lm_eval_include=folder), Rotating())  # type: ignore[arg-type]
    json.dumps(result)
    assert 0.5 <= result["rows"]["unchanged"]["tasks"]["local_choices"]["metrics"]["acc"]["value"] <= 1.0
    assert list(task.measures(result))
    assert task.tables(result)
    assert evaluated(folder, "local_choices", lm_eval_limit=2)["tasks"]["local_choices"]["questions"] == 2
    keys = {
        task.units(demo_request(256, lm_eval_include=folder, **options), demo_rows()[0])[0].key
        for options in ({}, {"lm_eval_limit": 2}, {"lm_eval_fewshot": 1}, {"seed": 3})
    }
    assert len(keys) == 4


@pytest.mark.parametrize("mark", [pytest.param(None, marks=needs_harness)], ids=[""])
def test_every_sequence_is_rotated_for_its_own_length_and_what_is_too_long_is_counted(folder: Path, mark: None) -> None:
    from longrope_export.evaluation.harness_model import EngineLM

    engine = Rotating()
    model = EngineLM(engine, demo_rows()[0], demo_tokenizer(), 20)  # type: ignore[arg-type]
    score, greedy = model._log_likelihood([1, 5, 6], [7, 8])
    losses = demo_engine().losses([1, 5, 6, 7, 8], 3)
    assert score == pytest.approx(-float(losses.sum()), rel=1e-5)
    assert greedy == (demo_engine().choices([1, 5, 6, 7, 8], 3).tolist() == [7, 8])
    assert (engine.lengths, model.truncated) == ([5], 0)
    assert model._log_likelihood(list(range(3, 40)), [7, 8])[0] == pytest.approx(
        -float(demo_engine().losses([*range(22, 40), 7, 8], 18).sum()), rel=1e-5
    )
    assert (engine.lengths[-1], model.truncated) == (20, 1)
    with pytest.raises(LongRopeError, match="samples its answers"):
        model._generate("x", {"do_sample": True, "temperature": 1.0})


def test_what_is_missing_is_said_before_the_model_is_loaded(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not INSTALLED:
            with pytest.raises(MissingDependencyError, match=r"pip install 'longrope-export\[eval\]'"):
                load_task("lm-eval:arc_easy").units(demo_request(256), demo_rows()[0])
            return
        with pytest.raises(InputFileError, match="is not a folder"):
            load_task("lm-eval:x").units(demo_request(256, lm_eval_include=folder / "no"), demo_rows()[0])
        with pytest.raises(LongRopeError, match="has no task 'local_nothing'"):
            load_task("lm-eval:local_nothing").units(demo_request(256, lm_eval_include=folder), demo_rows()[0])
