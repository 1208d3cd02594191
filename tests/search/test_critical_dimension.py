"""The search of the critical index: the right one is found, the others are dropped, and the structure holds."""

from __future__ import annotations

import numpy as np
import pytest
from bowl import DOCUMENTS, NUMBERS, Bowl, serve

from longrope_export.search.executors.local import InProcess
from longrope_export.search.protocol import SEARCH, VALIDATION, Trial
from longrope_export.search.space import RopeNumbers, closed_form
from longrope_export.search.strategies.cmaes import CmaEs, CmaOptions, Sampling
from longrope_export.search.strategies.critical_dimension import (
    CriticalIndexSearch,
    Recorded,
    critical_indices,
    rung_sizes,
)
from longrope_export.search.strategies.gradient import Descent, GradientDescent, GradientOptions
from longrope_export.search.strategies.log_space import LogSpace

INDICES = (1, 3, 5, 7)


def _arm(kind: str, critical: int) -> Recorded:
    start, space, generator = closed_form("yarn", NUMBERS), LogSpace(8, critical), np.random.default_rng(0)
    sizes = {"documents": DOCUMENTS, "validation_documents": 2, "generator": generator}
    if kind == "gradient":
        return GradientDescent(
            start, GradientOptions(), Descent(60, 1, 3), space, learn_attention=False, turns=[0.5] * 8, **sizes
        )  # fmt: skip
    return CmaEs(start, CmaOptions(), Sampling(400, 3), space, learn_attention=False, **sizes)


def _search(kind: str, true_index: int, rounds: int) -> tuple[CriticalIndexSearch, list[Trial]]:
    """Search with an optimum that has exactly the structure of `true_index`, and of no other index."""
    goal = LogSpace(8, true_index).expand(np.linspace(1.5, 1.9, 8 - true_index))
    strategy = CriticalIndexSearch({index: _arm(kind, index) for index in INDICES}, rounds, 2)
    return strategy, serve(strategy, InProcess(Bowl(goal=goal)))


@pytest.mark.parametrize(("kind", "rounds"), [("gradient", 20), ("cmaes", 12)])
@pytest.mark.parametrize("true_index", INDICES)
def test_an_index_that_can_hold_the_optimum_is_found(kind: str, rounds: int, true_index: int) -> None:
    # A smaller index leaves more pairs free: it can hold the same optimum. A larger one cannot.
    strategy, _ = _search(kind, true_index, rounds)
    (index,) = strategy.indices
    assert index <= true_index
    best = np.log(strategy.finalists()[0].factors)
    goal = LogSpace(8, true_index).expand(np.linspace(1.5, 1.9, 8 - true_index))
    np.testing.assert_allclose(best, goal, atol=0.12)
    np.testing.assert_allclose(best, LogSpace(8, index).expand(best[index:]), atol=1e-6)
    assert set(strategy.losses) == set(INDICES)
    too_large = [loss for other, loss in strategy.losses.items() if other > true_index]
    assert strategy.losses[index] < min(too_large, default=1.0)


def test_every_candidate_has_the_structure_of_an_index_that_is_tried() -> None:
    _, seen = _search("gradient", 3, 20)
    for trial in seen:
        logs = np.log(trial.candidate.factors)
        fits = [np.abs(LogSpace(8, index).expand(logs[index:]) - logs).max() < 1e-5 for index in INDICES]
        assert any(fits)


def test_arms_are_halved_and_only_the_last_one_runs_to_its_end() -> None:
    strategy, seen = _search("gradient", 5, 20)
    # Each rung serves its arms 20 times, a checkpoint among them; then the last arm has what is left of its 60 steps.
    assert 4 * 19 + 2 * 19 + 19 <= sum(trial.gradient for trial in seen) <= 4 * 20 + 2 * 20 + 25
    assert len(strategy.history) == 60


def test_arms_are_compared_on_the_same_documents() -> None:
    _, seen = _search("gradient", 3, 20)
    compared = [trial for trial in seen if not trial.gradient and trial.part == SEARCH]
    candidates = list(dict.fromkeys(trial.candidate for trial in compared))
    assert len(candidates) >= 4
    for candidate in candidates:
        assert {trial.document for trial in compared if trial.candidate == candidate} == {0, 1}
    assert VALIDATION in {trial.part for trial in seen}


def test_rungs() -> None:
    assert [rung_sizes(count) for count in (1, 2, 4, 5)] == [[1], [2, 1], [4, 2, 1], [5, 3, 2, 1]]


@pytest.mark.parametrize(
    ("rotary_dim", "theta", "window", "low", "high"),
    # LongRoPE2 (arXiv 2502.20082, §3.2 and eq. 7): LLaMA3-8B 24 to 35, Phi-3-mini 19 to 31.
    [(128, 5e5, 8192, 24, 35), (96, 1e4, 2048, 19, 31)],
)
def test_the_indices_tried_are_the_paper_s(rotary_dim: int, theta: float, window: int, low: int, high: int) -> None:
    numbers = RopeNumbers(rope_theta=theta, rotary_dim=rotary_dim, window=window, target=16 * window)
    indices = critical_indices(numbers)
    assert (indices[0], indices[-1], len(indices)) == (low, high, 4)
    assert list(indices) == sorted(set(indices))


def test_small_models_get_indices_that_they_have() -> None:
    numbers = RopeNumbers(rope_theta=10000.0, rotary_dim=8, window=32, target=64)
    assert all(0 <= index < 4 for index in critical_indices(numbers))
