"""What the benchmarks make of their measurements: rounds in turn, ratios of best times, and bounds that fail."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    return common


@pytest.fixture
def perplexity_cost(common: ModuleType) -> Any:
    import perplexity_cost

    return perplexity_cost


def test_every_run_is_first_in_turn(common: Any) -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "abc"}
    clock = iter(range(100))
    seconds = common.alternating_seconds(runs, 4, clock=lambda: float(next(clock)))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert seconds == {name: [1.0] * 4 for name in "abc"}


def test_ratios_of_the_best_times_and_their_spread(common: Any) -> None:
    seconds = {"ours": [3.0, 2.1, 8.0], "stock": [2.0, 2.1, 2.0]}
    assert common.best_ratio(seconds, "ours", "stock") == pytest.approx(1.05)
    assert common.ratio_spread(seconds, "ours", "stock") == (1.0, 1.5, 4.0)


@pytest.mark.parametrize(("losses", "exceeded"), [(0.44, False), (0.49, False), (0.51, True)])
def test_the_bound_on_time_fails_where_the_losses_cost_too_much(
    perplexity_cost: Any, capsys: pytest.CaptureFixture[str], losses: float, exceeded: bool
) -> None:
    seconds = {"body": [1.6, 1.7], "head 0": [0.2, 0.3], "head 1": [0.4, 0.2], "losses 0": [losses / 2, 9.0]}
    best = perplexity_cost.best_parts({**seconds, "losses 1": [3.0, losses / 2], "evaluation": [2.2]})
    assert best == pytest.approx({"body": 1.6, "head": 0.4, "losses": losses, "evaluation": 2.2})
    assert perplexity_cost.time_exceeded(best, 2048) is exceeded
    assert "the whole evaluation: 1.100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "exceeded"),
    [
        ({}, False),
        ({"seconds": 1.2}, True),
        ({"peaks": 2.2e9}, True),
        ({"losses": 2.01}, True),
        ({"losses": 1.99}, True),
    ],
)
def test_a_peer_that_is_faster_smaller_or_of_another_opinion_fails(
    perplexity_cost: Any, change: dict[str, float], exceeded: bool
) -> None:
    theirs = {"seconds": 1.0, "peaks": 2e9, "losses": 2.0}
    assert perplexity_cost.peers_exceeded({**theirs, **change}, theirs) is exceeded


@pytest.mark.parametrize(
    ("change", "exceeded"), [({}, False), ({"evaluation": [1.06], "step": [2.0]}, True), ({"step": [4.5]}, True)]
)
def test_a_search_s_costs_are_held_to_their_bounds(
    perplexity_cost: Any, change: dict[str, list[float]], exceeded: bool
) -> None:
    import gradient_cost

    assert gradient_cost._above("a model", {"bare": [1.0], "evaluation": [1.04], "step": [4.0], **change}) is exceeded


def test_the_peers_score_the_same_tokens(perplexity_cost: Any, tiny_llama: Path) -> None:
    from types import SimpleNamespace

    import numpy as np

    from longrope_export import load

    row = SimpleNamespace(token_ids=np.random.default_rng(0).integers(3, 97, 64))
    losses = {name: run() for name, run in perplexity_cost.peer_runs(load(tiny_llama), row).items()}
    for name, peer in perplexity_cost.PEERS.items():
        assert losses[name] == pytest.approx(losses[peer], abs=1e-5)
    assert losses["truncated"] != pytest.approx(losses["sliding"], abs=1e-3)


def test_the_unseen_model_s_texts_are_disjoint_and_the_longest_are_held_out(common: ModuleType) -> None:
    import unseen_model

    texts = {f"file-{index}": "x" * index for index in range(200)}
    parts = unseen_model.split_texts(texts)
    assert [len(parts[part]) for part in ("search", "report", "train")] == [72, 26, 102]
    assert sorted(name for names in parts.values() for name in names) == sorted(texts)
    assert max(len(texts[name]) for name in parts["train"]) < min(
        len(texts[name]) for name in parts["search"] + parts["report"]
    )
    assert unseen_model.split_texts(texts) == parts
