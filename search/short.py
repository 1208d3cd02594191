"""Sets for shorter sequences: inside the window, where the original frequencies win unless clearly beaten, and between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from longrope_export.errors import NumericalError
from longrope_export.search.build import Phase, build
from longrope_export.search.config import SearchConfig
from longrope_export.search.documents import in_between
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.long import EVOLUTION_SEEDS, perplexity
from longrope_export.search.plan import Plan
from longrope_export.search.protocol import SHORT_SEARCH, SHORT_VALIDATION
from longrope_export.search.space import Candidate, RopeNumbers, closed_form
from longrope_export.search.strategies.critical_dimension import Recorded
from longrope_export.search.strategies.gradient import Descent
from longrope_export.search.strategies.shifted import Shifted

ORIGINAL = "original"


@dataclass(frozen=True)
class ShortResult:
    """The chosen short set, and validation perplexities at the window: the original's and the searched one's."""

    candidate: Candidate
    original_perplexity: float | None = None
    searched_perplexity: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SetResult:
    """The set for one length in between, its name, and validation perplexities at that length by name."""

    candidate: Candidate
    chosen: str
    validation: Mapping[str, float]
    notes: tuple[str, ...] = ()


def search_short(
    evaluator: Evaluator, numbers: RopeNumbers, config: SearchConfig, plan: Plan, attention: float
) -> ShortResult:
    """Search at length L with the short set; it replaces the original only if its validation perplexity is lower by
    more than `config.short_margin` (a share). Both have the attention factor `attention`, from which
    `config.learn_short_attention` lets the searched one go. Nothing is searched when the plan gives it no budget.
    """
    original = numbers.short_original(attention)
    if not (plan.short_steps or plan.short_evaluations):
        return ShortResult(original)
    inside = numbers.inside(numbers.short_window)
    phase = _phase(config, inside.unchanged(attention), plan.short_steps, plan.short_evaluations, numbers.short_window)
    phase = replace(phase, learn_attention=config.learn_short_attention)
    strategy = _built(evaluator, config, numbers, inside, phase)
    notes = _run(evaluator, strategy, "the short set")
    candidates = list(dict.fromkeys([original, *strategy.finalists()]))
    losses = evaluator.mean_losses(candidates, SHORT_VALIDATION)
    found = min(range(1, len(losses)), key=losses.__getitem__, default=0)
    before, after = perplexity(losses[0]), perplexity(losses[found])
    better = after < before * (1.0 - config.short_margin)
    return ShortResult(candidates[found] if better else original, before, after, notes)


def search_set(
    evaluator: Evaluator,
    numbers: RopeNumbers,
    config: SearchConfig,
    plan: Plan,
    length: int,
    short: Candidate,
    long: Candidate,
) -> SetResult:
    """Search the set that the reference loader uses up to `length` tokens, L < `length` < L'.

    It has the short set's attention factor and n̂, because the record holds no others. The closed forms for that
    length, the short set and the long one are candidates too; the earlier one wins a tie.
    """
    here = numbers.inside(length)
    parts = in_between(length)
    unit = np.array(numbers.unit(here))
    own = {name: closed_form(name, here, short.attention_factor) for name in {*EVOLUTION_SEEDS, *config.baselines}}
    named = {name: replace(own[name], factors=tuple(unit * own[name].factors)) for name in config.baselines}
    named |= {"short": short, "long": replace(long, attention_factor=short.attention_factor)}
    named = {name: replace(each, start_tokens=short.start_tokens) for name, each in named.items()}
    losses = evaluator.mean_losses(list(named.values()), parts[1])
    start = list(named.values())[losses.index(min(losses))]
    start = replace(start, factors=tuple(np.array(start.factors) / unit))
    phase = _phase(config, start, plan.set_steps, plan.set_evaluations, numbers.window)
    phase = replace(
        phase, seeds=[own[name] for name in EVOLUTION_SEEDS], parts=parts, seed=(config.seed, length),
        bound=config.bound_multiple * here.scale, start_tokens=(short.start_tokens,),
    )  # fmt: skip
    strategy = _built(evaluator, config, numbers, here, phase)
    notes = _run(evaluator, strategy, f"the set for {length:,} tokens")
    named |= {f"searched {index}": each for index, each in enumerate(strategy.finalists())}
    losses = evaluator.mean_losses(list(named.values()), parts[1])
    validation = {name: perplexity(loss) for name, loss in zip(named, losses)}
    chosen = min(validation, key=validation.__getitem__)
    return SetResult(named[chosen], chosen, validation, notes)


def retention(evaluator: Evaluator, numbers: RopeNumbers, short: Candidate, long: Candidate) -> dict[str, float]:
    """Validation perplexity at the window L: of the unchanged model, with the short set, and with the long one."""
    candidates = {"unchanged": numbers.short_original(), "short factors": short, "long factors": long}
    losses = evaluator.mean_losses(list(candidates.values()), SHORT_VALIDATION)
    return {name: perplexity(loss) for name, loss in zip(candidates, losses)}


def _run(evaluator: Evaluator, strategy: Recorded, name: str) -> tuple[str, ...]:
    """Run it to its end, and give what the user should know: a set that cannot be searched ends no search."""
    try:
        evaluator.run(strategy)
    except NumericalError as error:
        return (f"{name} was not searched: {error}",)
    return tuple(f"{name}: {note}" for note in strategy.notes)


def _built(
    evaluator: Evaluator, config: SearchConfig, numbers: RopeNumbers, here: RopeNumbers, phase: Phase
) -> Recorded:
    """The optimiser on λ relative to `here`, whose trials are relative to what the model has."""
    strategy = build(evaluator, config, here, phase)
    return strategy if here.base_factors == numbers.base_factors else Shifted(strategy, numbers.unit(here))


def _phase(config: SearchConfig, start: Candidate, steps: int, evaluations: int, window: int) -> Phase:
    return Phase(
        start=start,
        seeds=[start],
        parts=(SHORT_SEARCH, SHORT_VALIDATION),
        descent=Descent(steps, 1, 1),
        evaluations=evaluations,
        bound=config.short_bound,
        learn_attention=False,
        seed=(config.seed, 1),
        evolution=config.evolution.quarter(),
        start_tokens=tuple(n for n in config.start_tokens or (0,) if n < window),
    )
