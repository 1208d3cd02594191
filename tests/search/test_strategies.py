"""Algorithm 1 and the descent through their ask/tell protocol, on functions whose optimum is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bowl import DOCUMENTS, GOAL, NUMBERS, Bowl, LastFirst, serve

from longrope_export.errors import NumericalError, ScalingError
from longrope_export.search.executors.local import InProcess
from longrope_export.search.protocol import SEARCH, VALIDATION, Outcome, Trial
from longrope_export.search.space import Candidate, PaperSpace, closed_form
from longrope_export.search.strategies.evolution import Evolution, EvolutionOptions
from longrope_export.search.strategies.gradient import Descent, EarlyPart, GradientDescent, GradientOptions
from longrope_export.search.strategies.log_space import LogSpace


def _evolution(evaluations: int = 10_000, seed: int = 0, space: PaperSpace | None = None, **options: Any) -> Evolution:
    small = {"population": 8, "iterations": 4, "mutations": 3, "crossovers": 2, "parents": 4, **options}
    return Evolution(
        space or PaperSpace(8, 5.0),
        [closed_form(name, NUMBERS) for name in ("pi", "ntk", "yarn")],
        EvolutionOptions(**small),
        documents=DOCUMENTS, evaluations=evaluations, attention_factor=1.125, generator=np.random.default_rng(seed),
    )  # fmt: skip


def _descent(
    plan: Descent, seed: int = 0, start: Candidate | None = None, learn: bool = True, turns: float = 0.5, **options: Any
) -> GradientDescent:
    chosen = GradientOptions(**options)
    return GradientDescent(
        start or closed_form("pi", NUMBERS), chosen, plan, LogSpace(8, 0, chosen.constraint, 4.2),
        learn_attention=learn, documents=DOCUMENTS, validation_documents=2, turns=[turns] * 8,
        generator=np.random.default_rng(seed),
    )  # fmt: skip


def _excess(candidate: Candidate) -> float:
    return float(np.abs(np.log(candidate.factors) - GOAL).max())


def test_algorithm_1_in_full_costs_1344_evaluations_of_distinct_candidates() -> None:
    assert EvolutionOptions().evaluations == 1344
    strategy = Evolution(
        PaperSpace(8, 5.0), [closed_form(name, NUMBERS) for name in ("pi", "ntk", "yarn")], EvolutionOptions(),
        documents=DOCUMENTS, evaluations=10_000, attention_factor=1.0, generator=np.random.default_rng(0),
    )  # fmt: skip
    seen = serve(strategy)
    assert len(seen) == 1344 * DOCUMENTS
    assert len({trial.candidate for trial in seen}) == 1344
    assert len(strategy.history) == 41
    assert strategy.history == sorted(strategy.history, reverse=True)
    seeds = min(Bowl().measure(Trial(trial.candidate, SEARCH, 0)).loss for trial in seen[: 3 * DOCUMENTS])
    assert strategy.history[-1] < 0.25 * seeds


def test_the_first_three_candidates_are_pi_ntk_and_yarn_on_the_grid() -> None:
    first = [trial.candidate for trial in _evolution().ask()[: 3 * DOCUMENTS : DOCUMENTS]]
    for name, candidate in zip(("pi", "ntk", "yarn"), first):
        expected = closed_form(name, NUMBERS).factors
        np.testing.assert_allclose(candidate.factors, expected, atol=0.00501)
        assert candidate.start_tokens == 0
        assert candidate.attention_factor == 1.125


def test_trials_come_in_candidate_and_document_order() -> None:
    trials = _evolution().ask()
    assert [trial.document for trial in trials] == [0, 1, 2] * 8
    assert all(len({trial.candidate for trial in trials[start : start + 3]}) == 1 for start in range(0, 24, 3))


@pytest.mark.parametrize("build", [_evolution, lambda seed: _descent(Descent(12, 1, 2), seed)])
def test_a_seed_gives_one_result_and_another_seed_another(build: Any) -> None:
    first, again, other = (serve(build(seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("build", [_evolution, lambda: _descent(Descent(12, 2, 2))])
def test_the_result_does_not_depend_on_the_order_of_arrival(build: Any) -> None:
    in_order, reversed_order = build(), build()
    serve(in_order)
    serve(reversed_order, LastFirst())
    assert in_order.finalists() == reversed_order.finalists()


def test_evolution_stops_at_its_budget_in_the_middle_of_a_generation() -> None:
    assert len(serve(_evolution(evaluations=10))) == 10 * DOCUMENTS


@pytest.mark.parametrize(
    ("option", "value", "evaluations"),
    [
        ("population", 5, 5 + 4 * 5),
        ("iterations", 2, 8 + 2 * 5),
        ("mutations", 1, 8 + 4 * 3),
        ("crossovers", 0, 8 + 4 * 3),
    ],
)
def test_the_sizes_of_algorithm_1(option: str, value: int, evaluations: int) -> None:
    assert len(serve(_evolution(**{option: value}))) == evaluations * DOCUMENTS


@pytest.mark.parametrize(
    "change",
    [
        {"parents": 2},
        {"mutation_probability": 0.9},
        {"space": PaperSpace(8, 5.0, step=0.1)},
        {"space": PaperSpace(8, 4.5)},
        {"space": PaperSpace(8, 5.0, start_tokens=(0, 7))},
    ],
)
def test_other_options_of_evolution_change_what_is_proposed(change: dict[str, Any]) -> None:
    assert [trial.candidate for trial in serve(_evolution(**change))] != [
        trial.candidate for trial in serve(_evolution())
    ]


def test_evolution_gives_up_on_an_exhausted_grid() -> None:
    space = PaperSpace(8, 2.0, step=1.0, start_tokens=(0,))
    # Nine non-decreasing sequences of 1 and 2 exist.
    assert 5 <= len({trial.candidate for trial in serve(_evolution(space=space, population=64))}) <= 9


def test_evolution_ranks_a_candidate_without_a_finite_loss_last() -> None:
    strategy = _evolution()
    trials = strategy.ask()
    strategy.tell([Outcome(math.inf)] * 3 + [Outcome(2.0)] * 3 + [Outcome(1.0)] * (len(trials) - 6))
    assert strategy.finalists() == [trials[6].candidate]


@pytest.mark.parametrize(
    "options",
    [{"population": 0}, {"iterations": -1}, {"mutations": -1}, {"crossovers": -1}, {"parents": 1},
     {"mutation_probability": 0.0}, {"mutation_probability": 1.5}],
)  # fmt: skip
def test_evolution_s_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ScalingError, match=next(iter(options)).replace("_", ".")):
        EvolutionOptions(**options)


def test_the_descent_reaches_the_optimum_and_learns_the_attention_factor() -> None:
    strategy = _descent(Descent(200, 1, 4))
    serve(strategy)
    best = strategy.finalists()[0]
    assert _excess(best) < 0.05
    assert best.attention_factor == pytest.approx(1.1, abs=0.01)
    assert len(strategy.history) == 200


def test_without_learning_the_attention_factor_stays() -> None:
    start = replace(closed_form("pi", NUMBERS), attention_factor=1.25, start_tokens=8)
    strategy = _descent(Descent(20, 1, 1), start=start, learn=False)
    seen = serve(strategy)
    assert {trial.candidate.attention_factor for trial in seen} == {1.25}
    assert {trial.candidate.start_tokens for trial in seen} == {8}


def test_every_document_is_taken_before_one_is_taken_again() -> None:
    seen = [trial for trial in serve(_descent(Descent(9, 1, 1))) if trial.gradient]
    assert all({trial.document for trial in seen[start : start + 3]} == {0, 1, 2} for start in (0, 3, 6))


def test_the_early_steps_are_on_the_early_part_and_the_others_on_whole_documents() -> None:
    descent = GradientDescent(
        closed_form("pi", NUMBERS), GradientOptions(), Descent(8, 2, 1, early_steps=6), LogSpace(8, 0, "none", 4.2),
        learn_attention=True, documents=DOCUMENTS, validation_documents=2, turns=[0.5] * 8,
        generator=np.random.default_rng(0), early=EarlyPart("early-search@8", 6, np.full(9, -0.25)),
    )  # fmt: skip
    steps = [trial for trial in serve(descent) if trial.gradient]
    assert [trial.part for trial in steps] == ["early-search@8"] * 12 + [SEARCH] * 4
    assert sorted(trial.document for trial in steps[:6]) == list(range(6))
    start = closed_form("pi", NUMBERS)
    assert steps[0].candidate.factors == pytest.approx(np.array(start.factors) * math.exp(-0.25))
    assert steps[0].candidate.attention_factor == pytest.approx(start.attention_factor * math.exp(-0.25))


def test_documents_per_step_and_checkpoints_are_the_plan_s() -> None:
    seen = serve(_descent(Descent(10, 2, 5)))
    assert sum(trial.gradient for trial in seen) == 20
    assert sum(not trial.gradient for trial in seen) == 5 * 2
    assert {trial.part for trial in seen if not trial.gradient} == {VALIDATION}


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.01}, {"attention_rate": 0.5}, {"warm_up": 0.6}, {"trust_region": 0.02}, {"average": 0.9},
     {"constraint": "none"}, {"constraint": "paper"}],
)  # fmt: skip
def test_every_option_of_the_descent_changes_its_end(options: dict[str, Any]) -> None:
    plain, changed = _descent(Descent(60, 1, 1)), _descent(Descent(60, 1, 1), **options)
    serve(plain)
    serve(changed)
    assert plain.finalists()[0] != changed.finalists()[0]


@pytest.mark.parametrize(("constraint", "bound"), [("monotone", None), ("paper", 4.2)])
def test_constraints_hold_at_every_step(constraint: str, bound: float | None) -> None:
    for trial in serve(_descent(Descent(60, 1, 3), constraint=constraint)):
        factors = trial.candidate.factors
        assert list(factors) == sorted(factors)
        if bound:
            assert factors[0] >= 1.0
            assert factors[-1] <= bound + 1e-6


def test_without_a_constraint_the_optimum_may_fall_again() -> None:
    strategy = _descent(Descent(80, 1, 1), constraint="none")
    serve(strategy)
    factors = strategy.finalists()[0].factors
    assert factors[-1] < factors[-2]


@pytest.mark.parametrize(("turns", "full_rate_turns", "share"), [(0.5, 1.0, 1.0), (4.0, 1.0, 0.25), (4.0, 2.0, 0.5)])
def test_fast_pairs_move_slower_in_proportion_to_their_turns(
    turns: float, full_rate_turns: float, share: float
) -> None:
    seen = serve(_descent(Descent(2, 1, 1), turns=turns, full_rate_turns=full_rate_turns, trust_region=9.0))
    first, second = (np.log(trial.candidate.factors) for trial in seen[:2])
    assert np.abs(second - first).max() == pytest.approx(GradientOptions().learning_rate * share, rel=1e-4)


def test_no_factor_moves_further_than_the_trust_region() -> None:
    steps = [
        trial.candidate
        for trial in serve(_descent(Descent(30, 1, 1), learning_rate=1.0, trust_region=0.03))
        if trial.gradient
    ]
    moves = [np.abs(np.log(b.factors) - np.log(a.factors)).max() for a, b in itertools.pairwise(steps)]
    assert 0.029 < max(moves) < 0.0301


class _Worsening(Bowl):
    """A descent whose validation losses only grow."""

    validated = 0

    def measure(self, trial: Trial) -> Outcome:
        if trial.part != VALIDATION:
            return super().measure(trial)
        self.validated += 1
        return Outcome(float(self.validated))


@pytest.mark.parametrize(("patience", "steps"), [(1, 20), (2, 30), (9, 100)])
def test_the_descent_stops_after_checkpoints_that_are_not_better(patience: int, steps: int) -> None:
    seen = serve(_descent(Descent(100, 1, 10), patience=patience), InProcess(_Worsening()))
    assert sum(trial.gradient for trial in seen) == steps


class _Breaking(Bowl):
    """Gradients after the first `good` ones are not finite."""

    good, count = 0, 0

    def measure(self, trial: Trial) -> Outcome:
        outcome = super().measure(trial)
        self.count += trial.gradient
        return replace(outcome, gradient=(math.nan,) * 9) if trial.gradient and self.count > self.good else outcome


def test_a_first_gradient_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericalError, match="gradient is NaN"):
        serve(_descent(Descent(5, 1, 1)), InProcess(_Breaking()))


@pytest.mark.parametrize("good", [1, 2, 6, 13])
def test_a_descent_ends_where_its_gradient_is_not_finite_with_the_iterates_before(good: int) -> None:
    whole, broken, objective = _descent(Descent(30, 1, 3)), _descent(Descent(30, 1, 3)), _Breaking()
    iterates = [trial.candidate for trial in serve(whole) if trial.gradient]
    objective.good = good
    seen = serve(broken, InProcess(objective))
    assert [trial.candidate for trial in seen if trial.gradient] == iterates[: good + 1]
    assert [len(broken.history), len(broken.notes), len(whole.notes)] == [good, 1, 0]
    assert f"at step {good + 1} of 30" in broken.notes[0]
    found = broken.finalists()
    assert found[-1] == iterates[good - 1]
    assert iterates[good] not in found
    validated = list(dict.fromkeys(trial.candidate for trial in seen if not trial.gradient))
    assert len(validated) == {1: 0, 2: 1, 6: 1, 13: 2}[good]
    assert set(validated) <= set(found)
    # The last checkpoint is of iterates whose gradient was finite.
    logs = [np.log(candidate.factors) for candidate in iterates[1:good]]
    if logs:
        average = np.mean(logs[-max(1, round(0.3 * len(logs))) :], axis=0)
        np.testing.assert_allclose(np.log(validated[-1].factors), average, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.0}, {"trust_region": 0.0}, {"full_rate_turns": 0.0},
     {"attention_rate": -1.0}, {"warm_up": 1.0}, {"average": 1.1},
     {"patience": 0}, {"documents_per_step": 0}, {"constraint": "convex"}],
)  # fmt: skip
def test_the_descent_s_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(ScalingError, match=next(iter(options))):
        GradientOptions(**options)


def test_the_paper_s_sizes_beyond_512k() -> None:
    large = EvolutionOptions().halved()
    assert (large.population, large.mutations, large.crossovers, large.iterations, large.parents) == (32, 8, 8, 40, 32)
    assert large.evaluations == 672


def _raced(race: bool, hardness: tuple[float, ...] = (0.0, 5.0, 1.0, 9.0)) -> tuple[Evolution, list[Trial]]:
    strategy = Evolution(
        PaperSpace(8, 5.0), [closed_form(name, NUMBERS) for name in ("pi", "ntk", "yarn")],
        EvolutionOptions(population=16, iterations=6, mutations=8, crossovers=4, parents=4),
        documents=4, evaluations=10_000, attention_factor=1.1, generator=np.random.default_rng(0), race=race,
    )  # fmt: skip
    return strategy, serve(strategy, InProcess(Bowl(hardness=hardness)), {SEARCH: 4, VALIDATION: 2})


def test_racing_measures_less_and_finds_the_same() -> None:
    (whole, all_trials), (raced, fewer) = _raced(False), _raced(True)
    assert raced.finalists() == whole.finalists()
    assert raced.history == whole.history
    assert len(fewer) < 0.75 * len(all_trials)
    # The winner was measured on every document.
    (winner,) = raced.finalists()
    assert {trial.document for trial in fewer if trial.candidate == winner} == {0, 1, 2, 3}


def test_what_racing_saves_is_spent_on_further_generations() -> None:
    def iterations(race: bool) -> int:
        strategy = Evolution(
            PaperSpace(8, 5.0), [closed_form("yarn", NUMBERS)],
            EvolutionOptions(population=8, iterations=50, mutations=4, crossovers=4, parents=2),
            documents=4, evaluations=40, attention_factor=1.1, generator=np.random.default_rng(0), race=race,
        )  # fmt: skip
        seen = serve(strategy, InProcess(Bowl()), {SEARCH: 4, VALIDATION: 2})
        assert 40 * 4 - 8 * 4 < len(seen) <= 40 * 4
        return len(strategy.history)

    assert iterations(True) > iterations(False) == 5
