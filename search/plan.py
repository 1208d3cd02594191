"""How a budget is divided: fixed before the first trial and kept in the journal, so resuming does not change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from longrope_export.errors import LongRopeError
from longrope_export.search.config import DEFAULT_PASSES, DEFAULT_SECONDS, SearchConfig, parse_budget
from longrope_export.search.strategies.critical_dimension import rung_sizes

# A gradient costs its forward pass and a backward pass, which counts as two more.
GRADIENT_UNITS = 3.0
# Shares of the budget: measuring each closed form, and the result beside them; and trying n̂.
_BASELINE_SHARE, _START_SHARE = 0.04, 0.1
# Steps on one document each before more documents a step pay; see docs/search.md.
_STEPS_BEFORE_WIDENING = 300
_CHECKPOINT_EVERY, _MOST_CHECKPOINTS = 10, 6
_FEWEST_SHORT_STEPS, _MOST_SHORT_STEPS = 8, 60
_FEWEST_SHORT_EVALUATIONS, _MOST_SHORT_EVALUATIONS = 16, 200


@dataclass(frozen=True)
class Timing:
    """Measured seconds of one forward pass and of one gradient, at the long and at the short length, and of an early one."""

    forward: float
    gradient: float
    short_forward: float
    short_gradient: float
    early_gradient: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of everything that a search will do; `units` is their sum, in documents measured at the long length.

    `gradient` and `early_gradient` are what one counts in it: three passes of its length, or what it was measured to take.
    `rounds` and `compare_documents` are for several critical indices: how often each is served before they are
    compared, and on how many documents. `set_*` are for each length in between; `early_steps` of `steps` are at the early
    length.
    """

    evaluations: int = 0
    baseline_documents: int = 0
    steps: int = 0
    documents_per_step: int = 1
    checkpoints: int = 0
    rounds: int = 0
    compare_documents: int = 0
    start_documents: int = 0
    short_steps: int = 0
    short_evaluations: int = 0
    set_steps: int = 0
    set_evaluations: int = 0
    early_steps: int = 0
    gradient: float = GRADIENT_UNITS
    early_gradient: float = 0.0
    units: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form for the journal."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """What the costs depend on: documents of each part, closed forms, values of n̂ above 0, L/L', and more.

    `unit` is the cost of one search document in forward passes at L' (an objective may need several); `sets` holds
    ℓ/L' for each length in between; `arms` is the number of critical indices, `population` of candidates a generation;
    `early_ratio` is the early steps' length over L', or 0.
    """

    documents: int
    validation: int
    short_documents: int
    short_validation: int
    baselines: int
    starts: int
    short_ratio: float
    unit: float = 1.0
    sets: tuple[float, ...] = ()
    arms: int = 1
    population: int = 1
    early_ratio: float = 0.0


@dataclass(frozen=True)
class _Costs:
    """Costs in search documents measured: what one of them is worth in everything else. `early` is of a gradient's."""

    gradient: float
    short_forward: float
    short_gradient: float
    sets: tuple[float, ...]
    early: float


def make_plan(config: SearchConfig, sizes: Sizes, measure: Callable[[], Timing]) -> Plan:
    """Divide the budget of a resolved `config`; `measure` is called only when a time has to be turned into a number.

    Raises `LongRopeError` when the budget does not allow one step.
    """
    budget = parse_budget(config.budget)
    if budget.evaluations is not None:
        return _divided(config, sizes, budget.evaluations * sizes.documents, None)
    timing = measure()
    if budget.seconds is None:
        # The same numbers on every machine that is fast enough for them.
        plan = _divided(config, sizes, _default_units(config, sizes), None)
        if expected_seconds(config, plan, timing, sizes.unit) <= DEFAULT_SECONDS:
            return plan
    final = (sizes.baselines + 3) * sizes.validation
    affordable = (budget.seconds or DEFAULT_SECONDS) / (timing.forward * sizes.unit) - final
    if budget.seconds is None:
        affordable = min(affordable, _default_units(config, sizes))
    return _divided(config, sizes, affordable, timing)


def expected_seconds(config: SearchConfig, plan: Plan, timing: Timing, unit: float) -> float:
    """Time of a whole plan at the measured pace; `unit` is one search document's cost in forward passes."""
    excess = timing.gradient - plan.gradient * timing.forward
    early_excess = timing.early_gradient - plan.early_gradient * timing.forward
    alive = rung_sizes(len(config.critical_indices or (0,)))
    each = plan.documents_per_step * sum(alive) / len(alive)
    excesses = each * ((plan.steps - plan.early_steps) * excess + plan.early_steps * early_excess)
    return unit * (timing.forward * plan.units + excesses)


def _divided(config: SearchConfig, sizes: Sizes, measured: float, timing: Timing | None) -> Plan:
    """`measured` is how many search documents may be measured, besides what the final choice costs."""
    costs = _costs(sizes, timing)
    if config.keep_long:
        return _plan_kept(config, sizes, measured, costs)
    return _PLANNERS[config.method](config, sizes, measured, costs)


def _default_units(config: SearchConfig, sizes: Sizes) -> float:
    full = config.evolution.evaluations / (1.0 - _short_share(config) - _sets_share(config, sizes))
    return DEFAULT_PASSES.get(config.method, full * sizes.documents)


def _costs(sizes: Sizes, timing: Timing | None) -> _Costs:
    sets = tuple(ratio / sizes.unit for ratio in sizes.sets)
    short = sizes.short_ratio / sizes.unit
    if timing is None:
        return _Costs(GRADIENT_UNITS, short, short * GRADIENT_UNITS, sets, sizes.early_ratio)
    whole = timing.forward * sizes.unit
    return _Costs(
        max(1.0, timing.gradient / timing.forward), timing.short_forward / whole, timing.short_gradient / whole, sets,
        timing.early_gradient / timing.gradient,
    )  # fmt: skip


def _short_share(config: SearchConfig) -> float:
    return config.short_share if config.short == "search" else 0.0


def _sets_share(config: SearchConfig, sizes: Sizes) -> float:
    return config.sets_share * len(sizes.sets)


def _plan_evolution(config: SearchConfig, sizes: Sizes, measured: float, costs: _Costs) -> Plan:
    most = min(_MOST_SHORT_EVALUATIONS, config.evolution.quarter().evaluations)
    short = _short_evaluations(_short_share(config), sizes, measured, costs, most)
    sets = _set_evaluations(config.sets_share, sizes, measured, costs)
    side = short * sizes.short_documents * costs.short_forward + sets * sizes.documents * sum(costs.sets)
    evaluations = min(config.evolution.evaluations, math.floor((measured - side) / sizes.documents))
    if evaluations < 1:
        raise _too_small(config, 1.0)
    units = float(evaluations * sizes.documents + (sizes.baselines + 1) * sizes.validation) + side
    return Plan(
        evaluations=evaluations, short_evaluations=short, set_evaluations=sets,
        units=units + _final_units(sizes, costs),
    )  # fmt: skip


def _short_evaluations(share: float, sizes: Sizes, measured: float, costs: _Costs, most: int) -> int:
    paid = math.floor(measured * share / costs.short_forward / sizes.short_documents)
    short = min(paid, most)
    return 0 if short < min(_FEWEST_SHORT_EVALUATIONS, most) else short


def _set_evaluations(share: float, sizes: Sizes, measured: float, costs: _Costs) -> int:
    return math.floor(measured * share / max(costs.sets) / sizes.documents) if costs.sets else 0


def _plan_cmaes(config: SearchConfig, sizes: Sizes, measured: float, costs: _Costs) -> Plan:
    baseline, starts, fixed = _comparisons(config, sizes, measured)
    short = _short_evaluations(_short_share(config), sizes, measured, costs, _MOST_SHORT_EVALUATIONS)
    sets = _set_evaluations(config.sets_share, sizes, measured, costs)
    side = short * sizes.short_documents * costs.short_forward + sets * sizes.documents * sum(costs.sets)
    rungs, share, compared = _rungs(sizes)
    compare = baseline if sizes.arms > 1 else 0
    evaluations = math.floor((measured - fixed - side - compared * compare) / sizes.documents * share)
    if evaluations < sizes.population * rungs:
        least = (fixed + compared * compare) / sizes.documents + sizes.population * rungs / share
        raise _too_small(config, least / (1.0 - _short_share(config) - _sets_share(config, sizes)))
    generations = evaluations // sizes.population
    checkpoints = min(max(generations // 3, 1), _MOST_CHECKPOINTS)
    asks = max(1, sizes.documents - 1) if config.race else 1
    units = evaluations / share * sizes.documents + fixed + side + compared * compare
    units += (sizes.baselines + checkpoints + 2) * sizes.validation + _final_units(sizes, costs)
    return Plan(
        evaluations=evaluations, baseline_documents=baseline, checkpoints=checkpoints,
        rounds=generations // rungs * asks, compare_documents=compare, start_documents=starts,
        short_evaluations=short, set_evaluations=sets, units=units,
    )  # fmt: skip


def _plan_gradient(config: SearchConfig, sizes: Sizes, measured: float, costs: _Costs) -> Plan:
    baseline, starts, fixed = _comparisons(config, sizes, measured)
    short = math.floor(_short_share(config) * measured / costs.short_gradient)
    short = 0 if short < _FEWEST_SHORT_STEPS else min(short, _MOST_SHORT_STEPS)
    sets = _set_steps(config.sets_share, measured, costs)
    rungs, share, compared = _rungs(sizes)
    compare = baseline if sizes.arms > 1 else 0
    fixed += short * costs.short_gradient + sets * sum(costs.sets) * costs.gradient + compared * compare
    early = config.early_share if sizes.early_ratio else 0.0
    gradient = costs.gradient * (1.0 - early * (1.0 - costs.early))
    gradients = math.floor((measured - fixed) / gradient * share + 1e-9)
    given = config.gradient.documents_per_step
    if gradients < (given or 1) * rungs:
        least = (fixed + gradient * (given or 1) * rungs / share) / sizes.documents
        raise _too_small(config, least)
    wide = given or min(max(round(gradients / _STEPS_BEFORE_WIDENING), 1), sizes.documents)
    steps = gradients // wide
    checkpoints = min(max(steps // _CHECKPOINT_EVERY, 1), _MOST_CHECKPOINTS)
    units = fixed + steps * wide * gradient / share + (sizes.baselines + checkpoints + 2) * sizes.validation
    return Plan(
        baseline_documents=baseline, steps=steps, documents_per_step=wide, checkpoints=checkpoints,
        rounds=steps // rungs, compare_documents=compare, start_documents=starts, short_steps=short, set_steps=sets,
        early_steps=round(early * steps), gradient=costs.gradient, early_gradient=costs.gradient * costs.early,
        units=units + _final_units(sizes, costs),
    )  # fmt: skip


def _plan_kept(config: SearchConfig, sizes: Sizes, measured: float, costs: _Costs) -> Plan:
    """The short set and those in between share the budget alike; the long one is only measured once."""
    wanted = config.short == "search"
    share = 1.0 / (len(sizes.sets) + wanted)
    if config.method == "gradient":
        short = min(math.floor(share * wanted * measured / costs.short_gradient), _MOST_SHORT_STEPS)
        sets = _set_steps(share, measured, costs)
        units = short * costs.short_gradient + sets * sum(costs.sets) * costs.gradient
        plan = Plan(short_steps=short, set_steps=sets, gradient=costs.gradient)
    else:
        short = _short_evaluations(share * wanted, sizes, measured, costs, _MOST_SHORT_EVALUATIONS)
        sets = _set_evaluations(share, sizes, measured, costs)
        units = short * sizes.short_documents * costs.short_forward + sets * sizes.documents * sum(costs.sets)
        plan = Plan(short_evaluations=short, set_evaluations=sets)
    if not short + sets:
        raise LongRopeError(
            f"the budget {config.budget or '(default time)'} does not pay for one step of the short set: give more"
        )
    return replace(plan, units=units + sizes.validation + _final_units(sizes, costs))


def _set_steps(share: float, measured: float, costs: _Costs) -> int:
    return math.floor(share * measured / (max(costs.sets) * costs.gradient)) if costs.sets else 0


def _comparisons(config: SearchConfig, sizes: Sizes, measured: float) -> tuple[int, int, float]:
    """Documents that the closed forms, and the values of n̂, are compared on; and what both cost."""
    seeds = 1 if config.init else sizes.baselines
    baseline = min(max(math.floor(_BASELINE_SHARE * measured), 1), sizes.documents)
    starts = min(math.floor(_START_SHARE * measured / sizes.starts), sizes.documents) if sizes.starts else 0
    starts = 0 if starts < min(2, sizes.documents) else starts
    return baseline, starts, float((seeds + 1) * baseline + starts * sizes.starts)


def _rungs(sizes: Sizes) -> tuple[int, float, int]:
    """Rungs that the arms are halved in, the last arm's share of all their work, and candidates compared."""
    alive = rung_sizes(sizes.arms)
    return len(alive), len(alive) / sum(alive), sum(alive[:-1])


def _final_units(sizes: Sizes, costs: _Costs) -> float:
    # What the window keeps: unchanged, with the short set, and with the long one.
    return 3 * sizes.short_validation * costs.short_forward


def _too_small(config: SearchConfig, least: float) -> LongRopeError:
    return LongRopeError(
        f"the budget {config.budget or '(default time)'} does not pay for one step of {config.strategy}: "
        f"give at least {math.ceil(least)} evaluations, a longer time, or fewer --documents"
    )


_PLANNERS: Mapping[str, Callable[[SearchConfig, Sizes, float, _Costs], Plan]] = {
    "gradient": _plan_gradient, "evolution": _plan_evolution, "cmaes": _plan_cmaes
}  # fmt: skip
