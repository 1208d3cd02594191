"""How a budget is divided, and what configurations are refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from longrope_export.errors import LongRopeError, ScalingError
from longrope_export.search.config import Budget, SearchConfig, parse_budget
from longrope_export.search.plan import Plan, Sizes, Timing, expected_seconds, make_plan
from longrope_export.search.space import RopeNumbers
from longrope_export.search.strategies.evolution import EvolutionOptions
from longrope_export.search.strategies.gradient import GradientOptions

NUMBERS = RopeNumbers(rope_theta=10000.0, rotary_dim=32, window=256, target=2048)
SIZES = Sizes(
    documents=4, validation=2, short_documents=16, short_validation=8, baselines=4, starts=5, short_ratio=0.125
)
TIMING = Timing(forward=2.0, gradient=7.0, short_forward=0.2, short_gradient=0.6)


def _plan(timing: Timing | None = None, sizes: Sizes = SIZES, kind: str = "hf", **options: Any) -> Plan:
    config = SearchConfig(**options).resolve(NUMBERS, kind)
    if kind == "gguf":
        sizes = replace(sizes, starts=0)

    def measure() -> Timing:
        assert timing is not None, "nothing is to be measured for a number of evaluations"
        return timing

    return make_plan(config, sizes, measure)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("400", Budget(evaluations=400)), ("7.5", Budget(evaluations=7.5)), ("90s", Budget(seconds=90)),
     ("45m", Budget(seconds=2700)), ("1.5H", Budget(seconds=5400)), (None, Budget())],
)  # fmt: skip
def test_budgets(text: str | None, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["", "0", "-4", "4d", "m", "1e3", "nan"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(LongRopeError, match="budget"):
        parse_budget(text)


def _search_units(plan: Plan, sizes: Sizes, cost: float = 3.0, short_cost: float = 0.375) -> float:
    baselines = (sizes.baselines + 1) * plan.baseline_documents
    return (
        baselines + plan.start_documents * sizes.starts + plan.steps * plan.documents_per_step * cost
        + plan.short_steps * short_cost
    )  # fmt: skip


@pytest.mark.parametrize("evaluations", [5, 7.5, 15, 30, 60, 120, 400])
def test_a_gradient_s_number_of_evaluations_is_kept_and_used(evaluations: float) -> None:
    plan = _plan(budget=str(evaluations))
    units = _search_units(plan, SIZES)
    step = 3.0 * plan.documents_per_step
    assert evaluations * 4 - step < units <= evaluations * 4
    assert plan.steps >= 1


def test_wider_budgets_take_more_documents_a_step() -> None:
    assert [_plan(budget=str(budget)).documents_per_step for budget in (15, 240, 960)] == [1, 1, 4]


@pytest.mark.parametrize("seconds", [120, 600, 3600])
def test_a_time_is_kept(seconds: int) -> None:
    plan = _plan(TIMING, budget=f"{seconds}s")
    assert seconds * 0.75 < plan.units * TIMING.forward <= seconds * 1.1


def test_the_default_is_a_number_of_evaluations_or_45_minutes() -> None:
    quick = Timing(0.01, 0.03, 0.001, 0.003)
    assert _search_units(_plan(quick), SIZES) == pytest.approx(4 * 120, abs=12)
    # Whatever a gradient is measured to take: the same search on every machine that is fast enough.
    assert _plan(replace(quick, gradient=0.014)) == _plan(replace(quick, gradient=0.06)) == _plan(quick)
    assert _plan(replace(TIMING, gradient=30.0)).steps < _plan(quick).steps
    slow = _plan(Timing(60.0, 180.0, 5.0, 15.0))
    assert slow.units * 60.0 == pytest.approx(45 * 60, rel=0.25)


def test_evolution_by_default_is_algorithm_1_in_full() -> None:
    assert _plan(Timing(0.01, 0.03, 0.001, 0.003), strategy="evolution").evaluations == 1344


@pytest.mark.parametrize(("budget", "evaluations"), [("100", 90), ("1344", 1244), ("9999", 1344)])
def test_evolution_s_budget(budget: str, evaluations: int) -> None:
    plan = _plan(strategy="evolution", budget=budget)
    assert plan.evaluations == evaluations
    assert plan.short_evaluations > 0
    assert _plan(strategy="evolution", budget=budget, short="original").evaluations == min(int(budget), 1344)


@pytest.mark.parametrize(("budget", "evaluations"), [("100", 90), ("1344", 1244), ("9999", 1344)])
def test_one_population_selects_among_the_critical_indices_so_they_cost_nothing(budget: str, evaluations: int) -> None:
    options = {"strategy": "critical-dim", "optimiser": "evolution", "budget": budget}
    plan = _plan(sizes=replace(SIZES, arms=12), **options)
    assert plan == _plan(strategy="evolution", budget=budget)
    assert (plan.evaluations, plan.rounds, plan.steps) == (evaluations, 0, 0)
    config = SearchConfig(**options).resolve(NUMBERS, "hf")
    assert expected_seconds(config, plan, TIMING, 1.0) == pytest.approx(plan.units * TIMING.forward)


def test_the_short_share() -> None:
    assert _plan(budget="60", short="original").short_steps == 0
    assert _plan(budget="60", short_share=0.0).short_steps == 0
    assert _plan(budget="60", short_share=0.05).short_steps < _plan(budget="60", short_share=0.09).short_steps


def test_without_start_tokens_none_are_tried() -> None:
    assert _plan(budget="60").start_documents > 0
    assert _plan(budget="60", kind="gguf").start_documents == 0


def test_one_closed_form_leaves_the_others_share_to_the_descent() -> None:
    many = replace(SIZES, documents=64)
    four, one = _plan(sizes=many, budget="2"), _plan(sizes=replace(many, baselines=1), budget="2")
    assert one.baseline_documents == four.baseline_documents == 5
    assert one.steps == four.steps + 3 * 5 // 3


def test_documents_per_step_can_be_set() -> None:
    plan = _plan(budget="60", gradient=GradientOptions(documents_per_step=3))
    assert plan.documents_per_step == 3


@pytest.mark.parametrize("options", [{"budget": "1"}, {"budget": "0.1", "strategy": "evolution"}])
def test_a_budget_for_less_than_a_step_is_refused_with_the_least_one(options: dict[str, Any]) -> None:
    with pytest.raises(LongRopeError, match="give at least") as caught:
        _plan(**options)
    least = str(caught.value).split("give at least ")[1].split(" ")[0]
    assert _plan(**{**options, "budget": least}).units > 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"strategy": "random"}, "strategy"),
        ({"runtime": "onnx"}, "--for"),
        ({"short": "none"}, "--short"),
        ({"baselines": ("yarn", "nope")}, "nope"),
        ({"baselines": ()}, "closed form"),
        ({"documents": -1}, "documents"),
        ({"validation_documents": 0}, "validation documents"),
        ({"short_share": 1.0}, "share"),
        ({"short_margin": -1.0}, "margin"),
        ({"seed": -1}, "seed"),
        ({"budget": "soon"}, "budget"),
    ],
)
def test_impossible_configurations_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(LongRopeError, match=word):
        SearchConfig(**options)


@pytest.mark.parametrize(
    ("options", "kind", "factor"),
    [
        ({"strategy": "evolution"}, "hf", (1 + 2.0794415 / 5.5451774) ** 0.5),
        ({"strategy": "gradient"}, "hf", None),
        ({"attention": "yarn"}, "hf", 1.20794415),
        ({"attention": "1.3"}, "hf", 1.3),
        ({"strategy": "evolution"}, "gguf", 1.0),
        ({"strategy": "gradient"}, "gguf", 1.0),
        ({"strategy": "gradient", "runtime": "gguf"}, "hf", 1.0),
        ({"strategy": "gradient", "runtime": "hf"}, "gguf", None),
    ],
)
def test_the_attention_factor_to_begin_with(options: dict[str, Any], kind: str, factor: float | None) -> None:
    resolved = SearchConfig(**options).resolve(NUMBERS, kind)
    assert resolved.attention_factor(NUMBERS) == (factor and pytest.approx(factor, rel=1e-6))
    assert resolved.learn_attention == (resolved.runtime == "hf")
    assert (resolved.start_tokens == (0,)) == (resolved.runtime == "gguf")


def test_start_tokens_are_refused_for_a_gguf() -> None:
    SearchConfig(start_tokens=(4,)).resolve(NUMBERS, "hf")
    with pytest.raises(LongRopeError, match="GGUF"):
        SearchConfig(start_tokens=(4,)).resolve(NUMBERS, "gguf")


@pytest.mark.parametrize("attention", ["sqrt", "0", "-1", "nan", "inf"])
def test_an_unknown_attention_factor_is_refused(attention: str) -> None:
    with pytest.raises(ScalingError, match="attention factor"):
        SearchConfig(attention=attention).resolve(NUMBERS, "hf")


def test_start_tokens_beyond_the_target_are_left_out_and_0_is_always_tried() -> None:
    assert SearchConfig(start_tokens=(4, 4096)).resolve(NUMBERS, "hf").start_tokens == (0, 4)
    assert SearchConfig(strategy="evolution").resolve(NUMBERS, "hf").start_tokens[-1] == 256


def test_evolution_s_sizes_bound_its_plan() -> None:
    small = EvolutionOptions(population=4, iterations=2, mutations=1, crossovers=1)
    assert _plan(strategy="evolution", budget="9999", evolution=small).evaluations == 8


def test_early_steps_buy_more_of_them_by_what_they_cost() -> None:
    sizes = replace(SIZES, early_ratio=0.5)
    options = {"budget": "40", "short": "original", "early_length": "4x"}
    plain, early = _plan(short="original", budget="40"), _plan(sizes=sizes, **options)
    assert early.early_steps == round(0.75 * early.steps)
    assert early.steps * early.documents_per_step == pytest.approx(
        plain.steps * plain.documents_per_step / (0.25 + 0.75 * 0.5), rel=0.05
    )
    assert early.units == pytest.approx(plain.units, rel=0.05)
    longer = _plan(sizes=sizes, **{**options, "early_share": 0.9})
    assert longer.early_steps > early.early_steps
    # By the clock: what an early gradient was measured to take, not the share of its length.
    quick, slow = (
        _plan(replace(TIMING, early_gradient=seconds), sizes, **{**options, "budget": "10m"}) for seconds in (1.5, 6.0)
    )
    assert quick.steps * quick.documents_per_step > 1.5 * slow.steps * slow.documents_per_step


def test_the_expected_time_counts_early_gradients_at_their_pace() -> None:
    sizes, timing = replace(SIZES, early_ratio=0.5), replace(TIMING, early_gradient=2.5)
    config = SearchConfig(budget="40", short="original", early_length="4x").resolve(NUMBERS, "hf")
    plan = make_plan(config, sizes, lambda: timing)
    gradients = plan.documents_per_step * plan.steps
    early = plan.documents_per_step * plan.early_steps
    others = plan.units - 3.0 * (gradients - early) - 1.5 * early
    expected = 2.0 * others + 7.0 * (gradients - early) + 2.5 * early
    assert expected_seconds(config, plan, timing, 1.0) == pytest.approx(expected)
