"""The perplexity family against brute force: truncated, sliding, retention, LongPPL, intervals and differences."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longrope_export import load
from longrope_export.description import describe
from longrope_export.errors import LongRopeError
from longrope_export.evaluation.documents import evaluation_rows
from longrope_export.evaluation.perplexity import evaluate_perplexity
from longrope_export.evaluation.results import EvaluationResult
from longrope_export.evaluation.run import EvaluateOptions, run_evaluation
from longrope_export.evaluation.statistics import difference_entry, interval, perplexity_entry, ratio_entry
from longrope_export.evaluation.tasks.longppl import key_tokens, short_windows
from longrope_export.evaluation.tasks.sliding import Window, windows

WINDOW, LONGEST, TEXT = 32, 96, 128
METHODS = ("unchanged", "pi", "dynamic-ntk")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    draws = np.random.default_rng(0)
    for index in range(4):
        letters = draws.choice(list("abcdefgh \n"), 140, p=[0.3, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05, 0.04, 0.04, 0.02])
        (folder / f"{index}.txt").write_text("".join(letters))
    return folder


@pytest.fixture(scope="module")
def options(model: Path, texts: Path, record: Path) -> dict[str, Any]:
    return {
        "models": (model,), "data": (texts,), "lengths": (WINDOW, LONGEST), "methods": METHODS, "scalings": (record,),
        "tasks": ("perplexity", "retention", "sliding", "longppl"), "threads": 1,
        "task_options": {"stride": 20, "text_tokens": TEXT, "longppl_alpha": 0.1, "longppl_beta": -6.0},
    }  # fmt: skip


def run(options: dict[str, Any], **changes: Any) -> EvaluationResult:
    chosen = EvaluateOptions(**{**options, **changes})
    return run_evaluation(chosen, [describe(path) for path in chosen.models])


@pytest.fixture(scope="module")
def result(options: dict[str, Any]) -> EvaluationResult:
    return run(options)


@pytest.fixture(scope="module")
def rows(texts: Path, tiny_tokenizer: Any) -> list[npt.NDArray[np.int64]]:
    return [row.token_ids for row in evaluation_rows([texts], tiny_tokenizer, TEXT)]


@pytest.fixture(scope="module")
def loaded(model: Path, record: Path) -> dict[str, Any]:
    """Models that rotate by themselves as the rows should: transformers' own, and the reference loader's."""
    config = AutoConfig.from_pretrained(model)
    config.rope_parameters = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 1.0}
    return {
        "unchanged": AutoModelForCausalLM.from_pretrained(model).eval(),
        "dynamic-ntk": AutoModelForCausalLM.from_pretrained(model, config=config).eval(),
        "searched": load(model, record),
        "short": load(model, record, switch="short"),
        "long": load(model, record, switch="long"),
    }


def brute(model: Any, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    row = torch.from_numpy(ids)[None]
    with torch.no_grad():
        model(row[:, :1], use_cache=False)  # transformers' dynamic NTK forgets longer rows only then
        logits = model(row, use_cache=False).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none").numpy()


def entries(result: EvaluationResult, task: str, row: str) -> dict[int, Any]:
    return {entry["length"]: entry for entry in result.values["tasks"][task]["rows"][row]["lengths"]}


@pytest.mark.parametrize("row", ["unchanged", "dynamic-ntk", "searched"])
def test_perplexity_is_that_of_a_model_that_rotates_by_itself(
    result: EvaluationResult, loaded: dict[str, Any], rows: list[Any], row: str
) -> None:
    for length in (WINDOW, LONGEST):
        losses = [brute(loaded[row], ids[:length]) for ids in rows]
        found = entries(result, "perplexity", row)[length]
        assert found["nll"] == pytest.approx(float(np.mean(losses)), abs=1e-5)
        assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
        assert found["documents"] == pytest.approx([float(values.mean()) for values in losses], abs=1e-5)
        assert found["tokens"] == 4 * (length - 1)


def test_a_pass_serves_every_length_and_task_with_its_set(result: EvaluationResult) -> None:
    perplexity = result.values["tasks"]["perplexity"]["rows"]
    assert [row["forward_passes"] for row in perplexity.values()] == [4, 4, 8, 8]
    sets = {name: [entry["set"] for entry in row["lengths"]] for name, row in perplexity.items()}
    assert sets == {
        "unchanged": ["own", "own"],
        "pi": ["static", "static"],
        "dynamic-ntk": ["short", "dynamic@96"],
        "searched": ["short", "long"],
    }


def test_spans_are_those_of_the_longest_length(
    result: EvaluationResult, loaded: dict[str, Any], rows: list[Any]
) -> None:
    losses = np.stack([brute(loaded["searched"], ids[:LONGEST]) for ids in rows])
    spans = result.values["tasks"]["perplexity"]["rows"]["searched"]["spans"]
    assert [(span["start"], span["end"]) for span in spans] == [(a, a + 8) for a in range(0, LONGEST, 8)]
    assert spans[0]["nll"] == pytest.approx(float(losses[:, :7].mean()), abs=1e-5)
    assert spans[3]["nll"] == pytest.approx(float(losses[:, 23:31].mean()), abs=1e-5)
    assert spans[3]["low"] < spans[3]["perplexity"] < spans[3]["high"]


def test_differences_are_paired_by_document(result: EvaluationResult) -> None:
    base, other = (entries(result, "perplexity", row)[LONGEST] for row in ("unchanged", "searched"))
    pairs = np.subtract(other["documents"], base["documents"])
    found = other["difference"]
    assert found["nll"] == pytest.approx(pairs.mean(), abs=1e-9)
    assert found["ratio"] == pytest.approx(other["perplexity"] / base["perplexity"])
    assert pairs.min() - 1e-12 <= found["low"] < found["nll"] < found["high"] <= pairs.max() + 1e-12
    assert base["difference"] is None


def test_retention_is_the_ratio_with_either_set(
    result: EvaluationResult, loaded: dict[str, Any], rows: list[Any]
) -> None:
    retention = result.values["tasks"]["retention"]
    plain = np.mean([brute(loaded["unchanged"], ids[:WINDOW]) for ids in rows])
    for side in ("short", "long"):
        found = retention["rows"]["searched"][side]
        losses = np.mean([brute(loaded[side], ids[:WINDOW]) for ids in rows])
        assert found["perplexity"] == pytest.approx(math.exp(losses), rel=1e-5)
        assert found["ratio"] == pytest.approx(math.exp(losses - plain), rel=1e-5)
        assert found["low"] < found["ratio"] < found["high"]
    assert list(retention["rows"]) == ["pi", "dynamic-ntk", "searched"]
    assert retention["rows"]["dynamic-ntk"]["short"]["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert abs(retention["rows"]["dynamic-ntk"]["long"]["ratio"] - 1.0) > 1e-3
    assert retention["rows"]["pi"]["short"] == retention["rows"]["pi"]["long"]


def test_retention_alone_has_its_own_pass_with_each_set(options: dict[str, Any], result: EvaluationResult) -> None:
    alone = run(options, tasks=("retention",), methods=("unchanged",), task_options={}).values["tasks"]["retention"]
    shared = result.values["tasks"]["retention"]
    for side in ("short", "long"):
        expected = shared["rows"]["searched"][side]
        assert alone["rows"]["searched"][side] == pytest.approx(expected, rel=1e-5)


def test_retention_without_the_unmodified_model_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(LongRopeError, match="add unchanged to --methods"):
        run(options, methods=("pi",), tasks=("retention",), task_options={})


@pytest.mark.parametrize(
    ("tokens", "length", "stride"), [(100, 30, 20), (100, 30, 29), (50, 50, 5), (61, 30, 7), (30, 40, 9)]
)
def test_sliding_windows_score_every_token_once(tokens: int, length: int, stride: int) -> None:
    found = windows(tokens, length, stride)
    scored = [index for window in found for index in range(window.first, window.end)]
    assert scored == list(range(1, tokens))
    assert {window.end - window.start for window in found} == {min(length, tokens)}
    assert all(window.first > window.start for window in found)
    assert max(window.end - window.first for window in found[1:] or found) <= max(stride, length - 1)
    assert found[1:2] == ([Window(stride, length + stride, length)] if tokens >= length + stride else found[1:2])


def test_sliding_perplexity_is_that_of_its_windows(
    result: EvaluationResult, loaded: dict[str, Any], rows: list[Any], tiny_tokenizer: Any
) -> None:
    losses = []
    for ids in rows:
        losses.append(brute(loaded["searched"], ids[:LONGEST]))
        for start, scored in ((20, 20), (32, 12)):  # the last window moves by what is left
            part = np.array([tiny_tokenizer.bos_token_id, *ids[start + 1 : start + LONGEST]])
            losses.append(brute(loaded["searched"], part)[-scored:])
    found = entries(result, "sliding", "searched")[LONGEST]
    assert found["tokens"] == sum(map(len, losses)) == 4 * (TEXT - 1)
    assert found["nll"] == pytest.approx(float(np.concatenate(losses).mean()), abs=1e-5)
    assert entries(result, "sliding", "searched")[WINDOW]["tokens"] == 4 * (TEXT - 1)
    assert result.values["tasks"]["sliding"]["rows"]["searched"]["forward_passes"] == 4 * (3 + 6)


def test_sliding_options_change_the_result(options: dict[str, Any], result: EvaluationResult) -> None:
    def nll(**changes: Any) -> float:
        few = {"tasks": ("sliding",), "methods": ("unchanged",), "scalings": (), "documents": 1, "lengths": (WINDOW,)}
        found = run(options, **few, task_options={"stride": 20, "text_tokens": 96, **changes})
        return float(entries(found, "sliding", "unchanged")[WINDOW]["nll"])

    assert len({nll(), nll(stride=5), nll(text_tokens=64)}) == 3
    with pytest.raises(LongRopeError, match="--stride is 32; a window of 32 tokens can move by 1 to 31"):
        nll(stride=32)
    with pytest.raises(LongRopeError, match="a window does not fit"):
        nll(text_tokens=31)


def test_longppl_is_that_of_the_tokens_that_the_context_explains(
    result: EvaluationResult, loaded: dict[str, Any], rows: list[Any], tiny_tokenizer: Any
) -> None:
    context, stride, model, kept = 24, 6, loaded["searched"], []
    for ids in rows:
        full, short = brute(model, ids[:LONGEST])[context - 1 :], []
        for start in range(0, LONGEST - context, stride):
            part = np.array([tiny_tokenizer.bos_token_id, *ids[start + 1 : start + context + stride]])
            short.append(brute(model, part)[context - 1 :])
        keys = (np.concatenate(short) - full > 0.1) & (-full > -6.0)
        kept.append(full[keys])
    found, longppl = entries(result, "longppl", "searched")[LONGEST], result.values["tasks"]["longppl"]
    assert (longppl["context"], longppl["stride"]) == (context, stride)
    assert found["key_tokens"] == sum(map(len, kept))
    assert 10 < found["key_tokens"] < found["tokens"] == 4 * (LONGEST - context)
    assert found["longppl"] == pytest.approx(math.exp(np.concatenate(kept).mean()), rel=1e-5)
    assert found["low"] < found["longppl"] < found["high"]


def test_longppl_of_a_shorter_length_reads_the_beginning_alone(options: dict[str, Any]) -> None:
    few: dict[str, Any] = {"tasks": ("longppl",), "methods": ("unchanged",), "scalings": (), "documents": 2}
    few["task_options"] = {"longppl_alpha": 0.1, "longppl_beta": -6.0}
    both = entries(run(options, **{**few, "lengths": (64, LONGEST)}), "longppl", "unchanged")
    alone = entries(run(options, **{**few, "lengths": (64,)}), "longppl", "unchanged")
    assert both[64]["longppl"] == pytest.approx(alone[64]["longppl"], rel=1e-5)
    assert both[64]["key_tokens"] == alone[64]["key_tokens"] < both[LONGEST]["key_tokens"]


def test_longppl_options_change_the_result(options: dict[str, Any]) -> None:
    few = {"tasks": ("longppl",), "methods": ("unchanged", "pi"), "scalings": (), "documents": 1, "lengths": (56,)}

    def found(**changes: Any) -> Any:
        task_options = {"longppl_alpha": 0.1, "longppl_beta": -6.0, **changes}
        return entries(run(options, **few, task_options=task_options), "longppl", "pi")[56]

    numbers = [found()]
    changes = ({"longppl_context": 30}, {"longppl_stride": 12}, {"longppl_alpha": 0.5}, {"longppl_beta": -4.0},
               {"longppl_evaluator": "unchanged"})  # fmt: skip
    for change in changes:
        entry = found(**change)
        assert (entry["longppl"], entry["key_tokens"]) != (numbers[0]["longppl"], numbers[0]["key_tokens"]), change
    assert found(longppl_alpha=100.0)["longppl"] is None
    with pytest.raises(LongRopeError, match="no such row; choose from unchanged, pi"):
        found(longppl_evaluator="yarn")
    with pytest.raises(LongRopeError, match="smaller --longppl-context"):
        found(longppl_context=56)


def test_key_tokens_follow_both_thresholds() -> None:
    short, full = np.float32([5.0, 3.9, 9.0, 2.5]), np.float32([1.0, 1.95, 2.1, 0.4])
    assert key_tokens(short, full, 2.0, -2.0).tolist() == [True, False, False, True]
    assert key_tokens(short, full, 2.2, -2.0).tolist() == [True, False, False, False]
    assert key_tokens(short, full, 1.9, -3.0).tolist() == [True, True, True, True]
    assert short_windows(20, 8, 5) == [(0, 13), (5, 18), (10, 20)]


def test_intervals_are_of_documents_and_weighted_by_tokens() -> None:
    assert interval([3.0], [1]) == (None, None)
    assert interval([2.0, 4.0, 6.0], [1, 2, 3]) == (2.0, 2.0)
    low, high = interval([0.0, 1.0] * 50, [1] * 100)
    assert low is not None
    assert high is not None
    assert (low, high) == pytest.approx((0.4, 0.6), abs=0.03)
    entry = perplexity_entry([1.0, 30.0], [1, 10])
    assert entry["nll"] == pytest.approx(31 / 11)
    assert (entry["low"], entry["high"]) == pytest.approx((math.exp(1.0), math.exp(3.0)))
    shifted = difference_entry([2.0, 31.0], [1.0, 21.0], [1, 10])
    assert (shifted["nll"], shifted["low"], shifted["high"]) == pytest.approx((1.0, 1.0, 1.0))
    assert ratio_entry([2.0, 31.0], [1.0, 21.0], [1, 10])["ratio"] == pytest.approx(math.e)
    assert perplexity_entry([1e6], [1])["perplexity"] < math.inf


def test_tables_and_csv_hold_the_numbers(result: EvaluationResult) -> None:
    from rich.console import Console

    from longrope_export.report.numbers import perplexity_text

    console = Console(width=200, record=True, file=io.StringIO())
    for table in result.tables():
        console.print(table)
    text = console.export_text()
    lines = list(csv.DictReader(io.StringIO(result.to_csv())))
    for metric in ("perplexity", "sliding perplexity", "retention perplexity", "LongPPL"):
        chosen = [line for line in lines if line["metric"] == metric]
        assert chosen
        assert all(perplexity_text(float(line["value"])) in text for line in chosen)
    found = entries(result, "perplexity", "searched")[LONGEST]
    (line,) = [
        line for line in lines
        if (line["task"], line["row"], line["length"], line["metric"]) == ("perplexity", "searched", "96", "nll difference")
    ]  # fmt: skip
    assert float(line["value"]) == found["difference"]["nll"]
    assert (float(line["low"]), line["set"]) == (found["difference"]["low"], "long")


def test_one_engine_run_equals_the_library_s_perplexity(
    result: EvaluationResult, loaded: dict[str, Any], rows: list[Any]
) -> None:
    direct = evaluate_perplexity(loaded["searched"], rows, [WINDOW, LONGEST])
    for length in (WINDOW, LONGEST):
        assert entries(result, "perplexity", "searched")[length]["perplexity"] == pytest.approx(
            direct.at(length).perplexity, rel=1e-5
        )
