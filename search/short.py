"""The short set: what sequences inside the window use. The original frequencies win unless clearly beaten."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from longrope_export.search.config import SearchConfig
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.plan import Plan
from longrope_export.search.protocol import SHORT_SEARCH, SHORT_VALIDATION, Strategy
from longrope_export.search.space import Candidate, PaperSpace, RopeNumbers
from longrope_export.search.strategies.evolution import Evolution
from longrope_export.search.strategies.gradient import Descent, GradientDescent

# The paper lowers the largest λ for the short set; its published short sets reach 2 to 5.
_SHORT_BOUND = 2.0


@dataclass(frozen=True)
class ShortResult:
    """The chosen short set, and validation perplexities at the window: the original's and the searched one's."""

    candidate: Candidate
    original_perplexity: float | None = None
    searched_perplexity: float | None = None


def search_short(
    evaluator: Evaluator, numbers: RopeNumbers, config: SearchConfig, plan: Plan, seed: int, attention: float
) -> ShortResult:
    """Search at length L with the short set; it replaces the original only if its validation perplexity is lower by
    more than `config.short_margin` (a share). Both have the attention factor `attention`. Nothing is searched when the
    plan gives it no budget.
    """
    original = numbers.unchanged(attention)
    if not (plan.short_steps or plan.short_evaluations):
        return ShortResult(original)
    strategy = _evolution(evaluator, original, numbers, config, plan, seed) if plan.short_evaluations else (
        _descent(evaluator, original, numbers, config, plan, seed)
    )  # fmt: skip
    evaluator.run(strategy)
    candidates = list(dict.fromkeys([original, *strategy.finalists()]))
    losses = evaluator.mean_losses(candidates, SHORT_VALIDATION)
    found = min(range(1, len(losses)), key=losses.__getitem__, default=0)
    before, after = math.exp(losses[0]), math.exp(losses[found])
    better = after < before * (1.0 - config.short_margin)
    return ShortResult(candidates[found] if better else original, before, after)


def _descent(
    evaluator: Evaluator, original: Candidate, numbers: RopeNumbers, config: SearchConfig, plan: Plan, seed: int
) -> Strategy:
    documents = evaluator.documents
    return GradientDescent(
        original,
        config.gradient,
        Descent(plan.short_steps, 1, 1),
        learn_attention=False,
        documents=documents[SHORT_SEARCH],
        validation_documents=documents[SHORT_VALIDATION],
        bound=_SHORT_BOUND,
        turns=numbers.turns,
        generator=np.random.default_rng([seed, 1]),
        parts=(SHORT_SEARCH, SHORT_VALIDATION),
    )


def _evolution(
    evaluator: Evaluator, original: Candidate, numbers: RopeNumbers, config: SearchConfig, plan: Plan, seed: int
) -> Strategy:
    return Evolution(
        PaperSpace(
            numbers.pairs,
            _SHORT_BOUND,
            config.step,
            tuple(n for n in config.start_tokens or (0,) if n < numbers.window),
        ),
        [original],
        config.evolution.quarter(),
        documents=evaluator.documents[SHORT_SEARCH],
        evaluations=plan.short_evaluations,
        attention_factor=original.attention_factor,
        generator=np.random.default_rng([seed, 1]),
        part=SHORT_SEARCH,
    )
