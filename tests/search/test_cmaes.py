"""CMA-ES through its ask/tell protocol: optimum, spaces, seeds, validation, options."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bowl import DOCUMENTS, GOAL, NUMBERS, Bowl, LastFirst, serve

from longrope_export.errors import MissingDependencyError, ScalingError
from longrope_export.search.executors.local import InProcess
from longrope_export.search.protocol import SEARCH, VALIDATION, Outcome, Trial
from longrope_export.search.space import Candidate, closed_form
from longrope_export.search.strategies.cmaes import CmaEs, CmaOptions, Sampling, ramps
from longrope_export.search.strategies.log_space import LogSpace

YARN = closed_form("yarn", NUMBERS)


def _cmaes(
    evaluations: int = 120,
    checkpoints: int = 3,
    seed: int = 0,
    start: Candidate = YARN,
    learn: bool = True,
    critical: int = 0,
    race: bool = False,
    **options: Any,
) -> CmaEs:
    chosen = CmaOptions(**options)
    return CmaEs(
        start, chosen, Sampling(evaluations, checkpoints), LogSpace(8, critical, chosen.constraint, 4.2),
        learn_attention=learn, documents=DOCUMENTS, validation_documents=2, generator=np.random.default_rng(seed),
        race=race,
    )  # fmt: skip


def _loss(candidate: Candidate) -> float:
    return float(np.mean([Bowl().measure(Trial(candidate, SEARCH, index)).loss for index in range(DOCUMENTS)]))


def test_it_reaches_the_optimum_and_the_attention_factor() -> None:
    strategy = _cmaes(1500)
    serve(strategy)
    best = strategy.finalists()[0]
    assert np.abs(np.log(best.factors) - GOAL).max() < 0.05
    assert best.attention_factor == pytest.approx(1.1, abs=0.02)
    assert strategy.history == sorted(strategy.history, reverse=True)


def test_the_best_candidate_and_the_means_are_finalists() -> None:
    strategy = _cmaes()
    seen = serve(strategy)
    searched = {trial.candidate for trial in seen if trial.part == SEARCH}
    best = min(searched, key=_loss)
    assert strategy.finalists()[-1] == best
    assert strategy.history[-1] == pytest.approx(_loss(best))
    means = [trial.candidate for trial in seen if trial.part == VALIDATION]
    assert strategy.finalists()[:-1] == list(dict.fromkeys(means[::-1]))
    assert len(set(means)) == 3


def test_few_knots_move_the_factors_along_straight_lines() -> None:
    for trial in serve(_cmaes(knots=2, start=NUMBERS.unchanged())):
        logs = np.log(trial.candidate.factors)
        assert np.abs(np.diff(logs, n=2)).max() < 1e-5
    assert np.abs(np.diff(np.log(serve(_cmaes())[0].candidate.factors), n=2)).max() > 0.01


def test_ramps_are_increments_with_variance_one_at_the_last_pair() -> None:
    full = ramps(5, 5)
    np.testing.assert_allclose(full * np.sqrt(5), np.tril(np.ones((5, 5))))
    few = ramps(9, 3)
    np.testing.assert_allclose(few[[0, 2, 4, 6, 8], 1] * np.sqrt(3), [0.0, 0.5, 1.0, 1.0, 1.0])
    for size, knots in ((5, 5), (9, 3), (4, 1)):
        variances = (ramps(size, knots) ** 2).sum(axis=1)
        assert variances[-1] == pytest.approx(1.0)
        assert (np.diff(variances) >= 0).all()


def test_the_critical_pair_s_structure_holds() -> None:
    for trial in serve(_cmaes(critical=3)):
        logs = np.log(trial.candidate.factors)
        np.testing.assert_allclose(logs[:3], logs[3] * np.arange(3) / 3, atol=1e-6)


@pytest.mark.parametrize(("constraint", "bound"), [("monotone", None), ("paper", 4.2)])
def test_constraints_hold_for_every_candidate(constraint: str, bound: float | None) -> None:
    seen = serve(_cmaes(constraint=constraint))
    assert len({trial.candidate for trial in seen}) > 50
    for trial in seen:
        factors = trial.candidate.factors
        assert list(factors) == sorted(factors)
        assert not bound or (factors[0] >= 1.0 and factors[-1] <= bound + 1e-6)


def test_a_seed_gives_one_result_and_another_seed_another() -> None:
    first, again, other = (serve(_cmaes(seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_result_does_not_depend_on_the_order_of_arrival() -> None:
    in_order, reversed_order = _cmaes(), _cmaes()
    serve(in_order)
    serve(reversed_order, LastFirst())
    assert in_order.finalists() == reversed_order.finalists()


def test_the_budget_is_kept_to_a_generation() -> None:
    options = CmaOptions()
    generation = options.candidates(8, True)
    assert generation == 4 + int(3 * np.log(9))
    seen = [trial for trial in serve(_cmaes(100)) if trial.part == SEARCH]
    assert 100 - generation < len(seen) / DOCUMENTS <= 100


def test_without_learning_the_attention_factor_and_start_tokens_stay() -> None:
    start = replace(YARN, attention_factor=1.25, start_tokens=8)
    seen = serve(_cmaes(learn=False, start=start))
    assert {(trial.candidate.attention_factor, trial.candidate.start_tokens) for trial in seen} == {(1.25, 8)}


@pytest.mark.parametrize("options", [{"sigma": 0.5}, {"knots": 3}, {"population": 20}, {"constraint": "paper"}])
def test_every_option_changes_what_is_measured(options: dict[str, Any]) -> None:
    assert serve(_cmaes(**options)) != serve(_cmaes())


def test_racing_saves_documents() -> None:
    plain, raced = _cmaes(400), _cmaes(400, race=True)
    serve(plain)
    serve(raced)
    assert len(raced.history) >= len(plain.history) + 3
    assert raced.history[-1] < plain.history[-1]


class _Worsening(Bowl):
    """Validation losses only grow."""

    count = 0

    def measure(self, trial: Trial) -> Outcome:
        if trial.part != VALIDATION:
            return super().measure(trial)
        self.count += 1
        return Outcome(float(self.count))


@pytest.mark.parametrize(("patience", "checkpoints"), [(1, 2), (2, 3), (9, 10)])
def test_it_stops_after_checkpoints_that_are_not_better(patience: int, checkpoints: int) -> None:
    seen = serve(_cmaes(200, 10, patience=patience), InProcess(_Worsening()))
    assert len({trial.candidate for trial in seen if trial.part == VALIDATION}) == checkpoints


def test_losses_that_are_not_finite_are_ranked_last() -> None:
    class Cliff(Bowl):
        def measure(self, trial: Trial) -> Outcome:
            return Outcome(np.inf) if trial.candidate.factors[-1] > 4.0 else super().measure(trial)

    strategy = _cmaes(200)
    serve(strategy, InProcess(Cliff()))
    assert strategy.finalists()[-1].factors[-1] <= 4.0
    assert np.isfinite(strategy.history[-1])


@pytest.mark.parametrize(
    "options", [{"sigma": 0.0}, {"sigma": float("nan")}, {"knots": 0}, {"population": 3}, {"patience": 0},
                {"constraint": "convex"}],
)  # fmt: skip
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ScalingError, match=next(iter(options))):
        CmaOptions(**options)


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(MissingDependencyError, match="cmaes"):
        _cmaes()
