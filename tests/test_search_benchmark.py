"""The search benchmark: the released operators as restated, the statistics of its tables, and its arms."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export.search.protocol import Outcome
from longrope_export.search.space import RopeNumbers

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
NUMBERS = RopeNumbers(rope_theta=10000.0, rotary_dim=32, window=256, target=2048)
SEED = np.linspace(1.0, 8.0, 16)


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def _released(**options: Any) -> Any:
    from released_operators import ReleasedSearch

    return ReleasedSearch(
        **{"seed_factors": SEED, "numbers": NUMBERS, "attention": 1.1, "documents": 2, "seed": 0, **options}
    )


def test_the_released_search_costs_1344_evaluations_and_keeps_its_order() -> None:
    search, asked = _released(), []
    while trials := search.ask():
        factors = [np.array(trial.candidate.factors) for trial in trials]
        asked += trials
        search.tell([Outcome(float(np.abs(np.log(each) - 1.0).mean())) for each in factors])
    assert len(asked) == 1344 * 2
    assert all(np.all(np.diff(trial.candidate.factors) >= 0) for trial in asked)
    assert asked[0].candidate.factors == pytest.approx(SEED)
    assert max(trial.candidate.factors[-1] for trial in asked) > 8.0  # above s, up to s + 1
    assert search.history == sorted(search.history, reverse=True)
    assert search.history[-1] < search.history[0]


def test_a_mutant_is_new_monotone_and_far_from_its_parent() -> None:
    search = _released()
    mutants = [search.mutate(SEED) for _ in range(20)]
    assert len({tuple(mutant) for mutant in mutants}) == 20
    changed = [int((mutant != SEED).sum()) for mutant in mutants]
    assert np.median(changed) >= 4


def test_a_crossover_that_succeeds_takes_little_of_the_other_parent() -> None:
    search = _released()
    other = SEED + 0.05
    child = search.cross(SEED, other)
    assert child is not None
    assert 1 <= int((child != SEED).sum()) <= 3


def test_intervals() -> None:
    from common import bootstrap_interval
    from search_tables import wilson_interval

    low, high = bootstrap_interval(np.random.default_rng(1).normal(0.5, 1.0, 400))
    assert 0.3 < low < 0.5 < high < 0.7
    assert wilson_interval(190, 200) == pytest.approx((0.9104, 0.9726), abs=1e-4)
    assert wilson_interval(0, 200)[0] == pytest.approx(0.0, abs=1e-12)


def test_the_over_fitting_gap_is_what_was_won_on_the_search_documents_alone() -> None:
    from search_tables import overfitting_gap

    run = {"perplexity": {"search": 9.0, "report": 19.0}, "yarn_on_search": 10.0}
    assert overfitting_gap(run, 20.0) == pytest.approx(0.95 / 0.9 - 1.0)
    assert overfitting_gap({**run, "perplexity": {"search": 9.0, "report": 18.0}}, 20.0) == pytest.approx(0.0)


def test_every_arm_s_options_are_a_configuration() -> None:
    from search_list import ARMS

    for arm in ARMS.values():
        assert arm.config.resolve(NUMBERS, "hf").documents == arm.documents


def test_an_arm_is_searched_measured_and_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import search_arms

    for name, count in {"POOL": 4, "VALIDATION": 1, "REPORT": 2, "PASSKEYS": 4}.items():
        monkeypatch.setattr(search_arms, name, count)
    options = {"budget": "4", "short": "original", "baselines": ("yarn",), "objective": "perplexity"}
    arm = search_arms.Arm("tiny", "a few steps", {**options, "validation_documents": 1}, documents=2, retrieve=True)
    bench = search_arms.Bench.open("2x")
    found = search_arms.run_arm(bench, arm, 0, tmp_path)
    assert found["passkeys"] == 4
    assert found["search_forwards"] <= 8
    assert found["perplexity"]["search"] <= found["yarn_on_search"]
    assert np.exp(np.mean(found["report_losses"])) == pytest.approx(found["perplexity"]["report"])
    assert search_arms.run_arm(bench, arm, 0, tmp_path) == found
    unchanged = search_arms.measured(bench, bench.candidate("unchanged"), bench.searched_rows(2, 0))
    assert unchanged["passkeys"] < 4
    assert unchanged["perplexity"]["report"] > found["perplexity"]["report"]


def test_spans_are_compared_on_the_same_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    from long_spans import report, spans_of

    window = np.full(4095, 2.0, dtype=np.float32)
    window[::2048] = np.nan
    losses = {"window": [window], "yarn": [window + 0.4], "best": [np.full(4095, 2.1, dtype=np.float32)]}
    losses["yarn"][0][np.isnan(window)] = 2.4
    lines = report({name: [spans_of(each) for each in rows] for name, rows in losses.items()}, 2048)
    assert "Δ log-loss to yarn                 -0.3000 (-0.3000 … -0.3000), 4 spans" in lines
    assert lines[-1] == "gap of yarn to the window of 2,048: 0.4000 nats; closed by best: 75 %"


def test_long_spans_measures_once_and_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    import long_spans

    from longrope_export.demo import demo_model_path

    text = tmp_path / "text.txt"
    text.write_text(Path(long_spans.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    command = [str(demo_model_path()), "--to", "2x", "--data", str(text), "--methods", "ntk,yarn", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["long_spans.py", *command, "--results", str(tmp_path / "spans")])
    long_spans.main()
    assert len(list((tmp_path / "spans").iterdir())) == 3
    first = capsys.readouterr().out.splitlines()
    assert first[-1].startswith("gap of ntk to the window of 256: ")
    # What was measured is not measured again.
    long_spans.main()
    assert capsys.readouterr().out.splitlines() == first[3:]


def test_the_novels_of_an_r_table() -> None:
    from novels import novels

    def stream(lines: list[str]) -> bytes:
        data = b"".join(b"\x00\x04\x00\x09" + struct.pack(">i", len(line)) + line.encode() for line in lines)
        return struct.pack(">I", len(data)) + zlib.compress(data)

    table = stream(["EMMA", "", "By Jane Austen"]) + stream(["PERSUASION", "x"])
    assert list(novels(table)) == [["EMMA", "", "By Jane Austen"], ["PERSUASION", "x"]]


def test_what_was_spent_counts_gradients_three_times_and_pieces_by_their_length(tmp_path: Path) -> None:
    from search_arms import spent

    parts = [("search", True), ("early-search@1024", True), ("validation", False), ("short-validation", False)]
    lines = [{}, *({"of": [part, 0, gradient, []], "loss": 1.0, "seconds": 2.0} for part, gradient in parts)]
    journal = tmp_path / "journal.jsonl"
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert spent(journal, 2048) == {
        "search_forwards": 4.5, "other_forwards": 1.0, "token_forwards": 5.5 * 2048, "seconds": 6.0
    }  # fmt: skip
