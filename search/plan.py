"""How a budget is divided: fixed before the first trial and kept in the journal, so resuming does not change it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from longrope_export.errors import LongRopeError
from longrope_export.search.config import DEFAULT_EVALUATIONS, DEFAULT_SECONDS, Budget, SearchConfig, parse_budget

# A gradient costs its forward pass and a backward pass, which counts as two more.
GRADIENT_UNITS = 3.0
# Shares of the budget: comparing the closed forms, and trying n̂.
_BASELINE_SHARE, _START_SHARE = 0.2, 0.1
# Steps on one document each before more documents a step pay; see docs/search.md.
_STEPS_BEFORE_WIDENING = 80
_CHECKPOINT_EVERY, _MOST_CHECKPOINTS = 10, 6
_FEWEST_SHORT_STEPS, _MOST_SHORT_STEPS = 8, 60
_FEWEST_SHORT_EVALUATIONS, _MOST_SHORT_EVALUATIONS = 16, 200


@dataclass(frozen=True)
class Timing:
    """Measured seconds of one forward pass and of one gradient, at the long and at the short length."""

    forward: float
    gradient: float
    short_forward: float
    short_gradient: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Numbers of everything that a search will do; `units` is their sum in forward passes at the long length."""

    evaluations: int = 0
    baseline_documents: int = 0
    steps: int = 0
    documents_per_step: int = 1
    checkpoints: int = 0
    start_documents: int = 0
    short_steps: int = 0
    short_evaluations: int = 0
    units: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form for the journal."""
        return asdict(self)


@dataclass(frozen=True)
class Sizes:
    """What the costs depend on: documents of each part, closed forms, values of n̂ above 0, and L/L'."""

    documents: int
    validation: int
    short_documents: int
    short_validation: int
    baselines: int
    starts: int
    short_ratio: float


def make_plan(config: SearchConfig, sizes: Sizes, measure: Callable[[], Timing]) -> Plan:
    """Divide the budget of a resolved `config`; `measure` is called only when a time has to be turned into a number.

    Raises `LongRopeError` when the budget does not allow one step.
    """
    budget = parse_budget(config.budget)
    timing = measure() if budget.evaluations is None else None
    passes = _passes(config, sizes, budget, timing)
    planner = _plan_evolution if config.strategy == "evolution" else _plan_gradient
    return planner(config, sizes, passes, timing)


def _passes(config: SearchConfig, sizes: Sizes, budget: Budget, timing: Timing | None) -> float:
    """Forward passes at the long length that the budget pays on the search documents."""
    if budget.evaluations is not None:
        return budget.evaluations * sizes.documents
    assert timing is not None
    final = (sizes.baselines + 3) * sizes.validation
    affordable = (budget.seconds or DEFAULT_SECONDS) / timing.forward - final
    if budget.seconds is not None:
        return affordable
    full = config.evolution.evaluations / (1.0 - _short_share(config))
    wanted = DEFAULT_EVALUATIONS.get(config.strategy, full)
    return min(affordable, wanted * sizes.documents)


def _short_share(config: SearchConfig) -> float:
    return config.short_share if config.short == "search" else 0.0


def _plan_evolution(config: SearchConfig, sizes: Sizes, passes: float, timing: Timing | None) -> Plan:
    ratio = timing.short_forward / timing.forward if timing else sizes.short_ratio
    most = min(_MOST_SHORT_EVALUATIONS, config.evolution.quarter().evaluations)
    short = min(math.floor(passes * _short_share(config) / ratio / sizes.short_documents), most)
    short = 0 if short < min(_FEWEST_SHORT_EVALUATIONS, most) else short
    left = passes - short * sizes.short_documents * ratio
    evaluations = min(config.evolution.evaluations, math.floor(left / sizes.documents))
    if evaluations < 1:
        raise _too_small(config, 1.0)
    units = float(evaluations * sizes.documents + (sizes.baselines + 1) * sizes.validation)
    units += (short * sizes.short_documents + 2 * sizes.short_validation) * ratio if short else 0
    return Plan(evaluations=evaluations, short_evaluations=short, units=units)


def _plan_gradient(config: SearchConfig, sizes: Sizes, passes: float, timing: Timing | None) -> Plan:
    cost = max(1.0, timing.gradient / timing.forward) if timing else GRADIENT_UNITS
    seeds = 1 if config.init else sizes.baselines
    baseline = min(max(math.floor(_BASELINE_SHARE * passes / (seeds + 1)), 1), sizes.documents)
    starts = min(math.floor(_START_SHARE * passes / sizes.starts), sizes.documents) if sizes.starts else 0
    starts = 0 if starts < min(2, sizes.documents) else starts
    short_ratio = timing.short_gradient / timing.forward if timing else sizes.short_ratio * GRADIENT_UNITS
    short = math.floor(_short_share(config) * passes / short_ratio)
    short = 0 if short < _FEWEST_SHORT_STEPS else min(short, _MOST_SHORT_STEPS)
    fixed = (seeds + 1) * baseline + starts * sizes.starts + short * short_ratio
    gradients = math.floor((passes - fixed) / cost + 1e-9)
    if gradients < (config.gradient.documents_per_step or 1):
        raise _too_small(config, (seeds + 1 + cost * (config.gradient.documents_per_step or 1)) / sizes.documents)
    wide = config.gradient.documents_per_step or min(max(round(gradients / _STEPS_BEFORE_WIDENING), 1), sizes.documents)
    steps = gradients // wide
    checkpoints = min(max(steps // _CHECKPOINT_EVERY, 1), _MOST_CHECKPOINTS)
    units = fixed + steps * wide * cost + (sizes.baselines + checkpoints + 2) * sizes.validation
    return Plan(
        baseline_documents=baseline, steps=steps, documents_per_step=wide, checkpoints=checkpoints,
        start_documents=starts, short_steps=short, units=units,
    )  # fmt: skip


def _too_small(config: SearchConfig, least: float) -> LongRopeError:
    return LongRopeError(
        f"the budget {config.budget or '(default time)'} does not pay for one step of {config.strategy}: "
        f"give at least {math.ceil(least)} evaluations, a longer time, or fewer --documents"
    )
