"""The long set: the closed forms, a strategy that starts from them, and the choice on the validation documents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from longrope_export.errors import NumericalError, UnsupportedModelError
from longrope_export.search.config import SearchConfig
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.plan import Plan
from longrope_export.search.protocol import SEARCH, VALIDATION
from longrope_export.search.space import Candidate, PaperSpace, RopeNumbers, closed_form
from longrope_export.search.strategies.evolution import Evolution
from longrope_export.search.strategies.gradient import Descent, GradientDescent

# Algorithm 1's seeds. The paper says YaRN, which is frequency-linear; the released code seeds with the
# wavelength-linear variant alone, and with neither PI nor NTK.
EVOLUTION_SEEDS = ("pi", "ntk", "yarn")
SEARCHED = "searched"


@dataclass(frozen=True)
class LongResult:
    """The chosen long set, its name ("searched" or a closed form's), and perplexities by name on either part.

    `history` is the best loss after each generation, or the loss at each step.
    """

    candidate: Candidate
    chosen: str
    search: Mapping[str, float]
    validation: Mapping[str, float]
    history: tuple[float, ...]


def search_long(
    evaluator: Evaluator,
    numbers: RopeNumbers,
    config: SearchConfig,
    plan: Plan,
    seed: int,
    init: Candidate | None = None,
) -> LongResult:
    """Find the long set at length L'; on the validation documents it is never worse than the best closed form.

    Raises `UnsupportedModelError` when factors do not change the model's loss, `NumericalError` when no candidate has
    a finite one.
    """
    attention = config.attention_factor(numbers)
    baselines = {name: closed_form(name, numbers, attention) for name in config.baselines}
    search: dict[str, float] = {}
    if config.strategy == "evolution":
        strategy: Evolution | GradientDescent = _evolution(evaluator, numbers, config, plan, seed)
    else:
        starts = {"init": init} if init else baselines
        losses = evaluator.mean_losses(list(starts.values()), SEARCH, plan.baseline_documents)
        _check_effect(losses, numbers)
        search |= {name: _perplexity(loss) for name, loss in zip(starts, losses)}
        start = list(starts.values())[int(np.argmin(losses))]
        strategy = _descent(evaluator, numbers, config, plan, seed, start)
    evaluator.run(strategy)
    named = baselines | ({"init": init} if init else {}) | {SEARCHED: _best(evaluator, strategy)}
    losses = evaluator.mean_losses(list(named.values()), VALIDATION)
    validation = {name: _perplexity(loss) for name, loss in zip(named, losses)}
    chosen = min(named, key=lambda name: (validation[name], name == SEARCHED))
    if not math.isfinite(validation[chosen]):
        raise NumericalError("every candidate's loss is NaN or infinite; try --dtype float32")
    search[SEARCHED] = _final_search(evaluator, config, plan, strategy, named[SEARCHED])
    return LongResult(named[chosen], chosen, search, validation, tuple(strategy.history))


def choose_start_tokens(
    evaluator: Evaluator, result: LongResult, config: SearchConfig, plan: Plan
) -> tuple[LongResult, Mapping[int, float]]:
    """Try the values of n̂ with the factors fixed: one is taken if it is better on the search and on the validation
    documents, so that 0 wins ties. Returns the result and the search perplexities by n̂.
    """
    if not plan.start_documents:
        return result, {}
    values = config.start_tokens or (0,)
    candidates = [replace(result.candidate, start_tokens=value) for value in values]
    losses = evaluator.mean_losses(candidates, SEARCH, plan.start_documents)
    tried = {value: _perplexity(loss) for value, loss in zip(values, losses)}
    best = int(np.argmin(losses))
    if values[best] == 0:
        return result, tried
    before, after = evaluator.mean_losses([result.candidate, candidates[best]], VALIDATION)
    if not after < before:
        return result, tried
    validation = {**result.validation, f"{result.chosen}, n̂ = {values[best]}": _perplexity(after)}
    return replace(result, candidate=candidates[best], validation=validation), tried


def _evolution(evaluator: Evaluator, numbers: RopeNumbers, config: SearchConfig, plan: Plan, seed: int) -> Evolution:
    attention = config.attention_factor(numbers)
    return Evolution(
        PaperSpace(numbers.pairs, config.bound * numbers.scale, config.step, config.start_tokens or (0,)),
        [closed_form(name, numbers) for name in EVOLUTION_SEEDS],
        config.evolution,
        documents=evaluator.documents[SEARCH],
        evaluations=plan.evaluations,
        attention_factor=1.0 if attention is None else attention,
        generator=np.random.default_rng([seed, 0]),
    )


def _descent(
    evaluator: Evaluator, numbers: RopeNumbers, config: SearchConfig, plan: Plan, seed: int, start: Candidate
) -> GradientDescent:
    return GradientDescent(
        start,
        config.gradient,
        Descent(plan.steps, plan.documents_per_step, plan.checkpoints),
        learn_attention=bool(config.learn_attention),
        documents=evaluator.documents[SEARCH],
        validation_documents=evaluator.documents[VALIDATION],
        bound=config.bound * numbers.scale,
        turns=numbers.turns,
        generator=np.random.default_rng([seed, 0]),
    )


def _best(evaluator: Evaluator, strategy: Evolution | GradientDescent) -> Candidate:
    finalists = strategy.finalists()
    losses = evaluator.mean_losses(finalists, VALIDATION)
    return finalists[int(np.argmin(losses))]


def _final_search(
    evaluator: Evaluator, config: SearchConfig, plan: Plan, strategy: Evolution | GradientDescent, found: Candidate
) -> float:
    if config.strategy == "evolution":
        return _perplexity(strategy.history[-1])
    # On the documents that the closed forms were compared on, so that these numbers stand beside each other.
    return _perplexity(evaluator.mean_losses([found], SEARCH, plan.baseline_documents)[0])


def _check_effect(losses: list[float], numbers: RopeNumbers) -> None:
    if len(losses) > 1 and numbers.pairs > 1 and len(set(losses)) == 1 and math.isfinite(losses[0]):
        raise UnsupportedModelError(
            "different factors give exactly the same loss: this model's rotary embedding is not where it is expected"
        )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf
