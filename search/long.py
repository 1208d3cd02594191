"""The long set: the closed forms, a strategy that starts from them, and the choice on the validation documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from longrope_export.errors import NumericalError, UnsupportedModelError
from longrope_export.search.build import Phase, build, build_index_search
from longrope_export.search.config import SearchConfig
from longrope_export.search.documents import EARLY
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.plan import Plan
from longrope_export.search.protocol import SEARCH, VALIDATION, Strategy
from longrope_export.search.space import Candidate, RopeNumbers, closed_form
from longrope_export.search.strategies.critical_dimension import CriticalIndexSearch, Recorded
from longrope_export.search.strategies.evolution import Evolution
from longrope_export.search.strategies.gradient import Descent
from longrope_export.tolerances import SAME_LOSS

# Algorithm 1's seeds. The paper says YaRN, which is frequency-linear; the released code seeds with the
# wavelength-linear variant alone, and with neither PI nor NTK.
EVOLUTION_SEEDS = ("pi", "ntk", "yarn")
SEARCHED, INIT = "searched", "init"
# Only the reference loader applies n̂, so by how much less perplexity, as a share, one above 0 must have.
START_MARGIN = 0.001


@dataclass(frozen=True)
class LongResult:
    """The chosen long set, its name ("searched" or a closed form's), and perplexities by name on either part.

    `history` is the best loss after each generation, or the loss at each step; `critical` holds the search perplexity
    by critical index, as far as they were compared.
    """

    candidate: Candidate
    chosen: str
    search: Mapping[str, float]
    validation: Mapping[str, float]
    history: tuple[float, ...]
    critical: Mapping[int, float]


class LongSearch:
    """The search for the long set at length L', in order; `strategy` is there once it runs.

    On the validation documents the result is never worse than the best closed form.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        numbers: RopeNumbers,
        config: SearchConfig,
        plan: Plan,
        init: Candidate | None = None,
    ) -> None:
        self._evaluator, self._numbers, self._config, self._plan = evaluator, numbers, config, plan
        attention = config.attention_factor(numbers)
        self.closed_forms = {name: closed_form(name, numbers, attention) for name in config.baselines}
        self.named = self.closed_forms | ({INIT: init} if init else {})
        self._init = init
        self.strategy: Recorded | None = None

    def run(self) -> LongResult:
        """Measure, search, choose.

        Raises `UnsupportedModelError` when factors do not change the model's loss, `NumericalError` when no candidate
        has a finite one.
        """
        if self._config.keep_long and self._init:
            return self._kept(self._init)
        losses = self._evaluator.mean_losses(list(self.named.values()), VALIDATION)
        _check_effect(losses, self._numbers)
        search: dict[str, float] = {}
        self.strategy = strategy = self._strategy(search)
        self._evaluator.run(strategy)
        named = self.named | {SEARCHED: self._best(strategy)}
        losses = self._evaluator.mean_losses(list(named.values()), VALIDATION)
        validation = {name: perplexity(loss) for name, loss in zip(named, losses)}
        chosen = min(named, key=lambda name: (validation[name], name == SEARCHED))
        if not math.isfinite(validation[chosen]):
            raise NumericalError("every candidate's loss is NaN or infinite; try --dtype float32")
        search[SEARCHED] = self._final_search(strategy, named[SEARCHED])
        compared = strategy.losses if isinstance(strategy, CriticalIndexSearch | Evolution) else {}
        critical = {index: perplexity(loss) for index, loss in compared.items() if self._config.critical_indices}
        return LongResult(named[chosen], chosen, search, validation, tuple(strategy.history), critical)

    def _kept(self, init: Candidate) -> LongResult:
        loss = self._evaluator.mean_losses([init], VALIDATION)[0]
        return LongResult(init, INIT, {}, {INIT: perplexity(loss)}, (), {})

    def _strategy(self, search: dict[str, float]) -> Recorded:
        """The strategy, begun at the closed form (or `init`) that is best on some search documents."""
        config = self._config
        if config.method == "evolution":
            attention = config.attention_factor(self._numbers)
            start = self._numbers.unchanged(1.0 if attention is None else attention)
            phase = replace(self._phase(start), critical_indices=config.critical_indices or ())
            return build(self._evaluator, config, self._numbers, phase)
        starts = {INIT: self._init} if self._init else self.closed_forms
        losses = self._evaluator.mean_losses(list(starts.values()), SEARCH, self._plan.baseline_documents)
        search |= {name: perplexity(loss) for name, loss in zip(starts, losses)}
        name = list(starts)[int(np.argmin(losses))]
        start, shift = starts[name], self._early_shift(name)
        arms = {
            index: build(self._evaluator, config, self._numbers, self._phase(start, index, shift))
            for index in config.critical_indices or (0,)
        }
        return build_index_search(arms, self._plan.rounds, self._plan.compare_documents, SEARCH)

    def _early_shift(self, name: str) -> tuple[float, ...]:
        """From a closed form for L' to the same one for the early length, in (log λ …, log m); an `init` goes by YaRN."""
        found = [part for part in self._evaluator.documents if part.startswith(EARLY)]
        if not found:
            return (0.0,)
        form, attention = (name if name in self.closed_forms else "yarn"), self._config.attention_factor(self._numbers)
        lengths = (int(found[0].partition("@")[2]), self._numbers.target)
        ends = [closed_form(form, replace(self._numbers, target=length), attention) for length in lengths]
        early, whole = (np.log([*each.factors, each.attention_factor]) for each in ends)
        return tuple((early - whole).tolist())

    def _phase(self, start: Candidate, critical: int = 0, shift: tuple[float, ...] = (0.0,)) -> Phase:
        config, plan = self._config, self._plan
        return Phase(
            start=start,
            seeds=[closed_form(name, self._numbers) for name in EVOLUTION_SEEDS],
            parts=(SEARCH, VALIDATION),
            descent=Descent(plan.steps, plan.documents_per_step, plan.checkpoints, plan.early_steps),
            evaluations=plan.evaluations,
            bound=config.bound_multiple * self._numbers.scale,
            learn_attention=bool(config.learn_attention),
            seed=(config.seed, 0),
            evolution=config.evolution,
            start_tokens=config.start_tokens or (0,),
            critical=critical,
            early_shift=shift,
        )

    def _best(self, strategy: Strategy) -> Candidate:
        finalists = strategy.finalists()
        losses = self._evaluator.mean_losses(finalists, VALIDATION)
        return finalists[int(np.argmin(losses))]

    def _final_search(self, strategy: Recorded, found: Candidate) -> float:
        if self._config.method == "evolution":
            return perplexity(strategy.history[-1])
        # On the documents that the closed forms were compared on, so that these numbers stand beside each other.
        return perplexity(self._evaluator.mean_losses([found], SEARCH, self._plan.baseline_documents)[0])


def choose_start_tokens(
    evaluator: Evaluator, result: LongResult, config: SearchConfig, plan: Plan
) -> tuple[LongResult, Mapping[int, float]]:
    """Try the values of n̂ with the factors fixed: one is taken if it is better on the search and on the validation
    documents, so that the present one wins ties; one above 0, which few runtimes apply, by `START_MARGIN` there. Returns the
    result and the search perplexities by n̂.
    """
    if not plan.start_documents:
        return result, {}
    values = list(dict.fromkeys((result.candidate.start_tokens, *(config.start_tokens or (0,)))))
    candidates = [replace(result.candidate, start_tokens=value) for value in values]
    losses = evaluator.mean_losses(candidates, SEARCH, plan.start_documents)
    tried = {value: perplexity(loss) for value, loss in zip(values, losses)}
    best = int(np.argmin(losses))
    if best == 0:
        return result, tried
    before, after = evaluator.mean_losses([result.candidate, candidates[best]], VALIDATION)
    if not perplexity(after) < perplexity(before) * (1.0 - START_MARGIN * bool(values[best])):
        return result, tried
    validation = {**result.validation, f"{result.chosen}, n̂ = {values[best]}": perplexity(after)}
    return replace(result, candidate=candidates[best], validation=validation), tried


def _check_effect(losses: Sequence[float], numbers: RopeNumbers) -> None:
    if len(losses) > 1 and numbers.pairs > 1 and max(losses) - min(losses) <= SAME_LOSS:
        raise UnsupportedModelError(
            "different factors give the same loss: this model's rotary embedding is not where it is expected"
        )


def perplexity(loss: float) -> float:
    """exp of a loss in nats, inf where that is no number."""
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else math.inf
