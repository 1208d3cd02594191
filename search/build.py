"""The optimisers by name, each built from what one phase of a search gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from longrope_export.search.config import SearchConfig
from longrope_export.search.documents import EARLY
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.space import Candidate, PaperSpace, RopeNumbers
from longrope_export.search.strategies.cmaes import CmaEs, Sampling
from longrope_export.search.strategies.critical_dimension import CriticalIndexSearch, Recorded
from longrope_export.search.strategies.critical_space import CriticalSpace
from longrope_export.search.strategies.evolution import Evolution, EvolutionOptions, Space
from longrope_export.search.strategies.gradient import Descent, EarlyPart, GradientDescent
from longrope_export.search.strategies.log_space import Constraint, LogSpace


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one optimiser works on: where it starts, on which parts, how long, and how far λ may go.

    `seeds` are Algorithm 1's; the others begin at `start`. `bound` is the largest λ of Algorithm 1 and of the constraint
    "paper". `descent` and `evaluations` say how long it runs, whichever the optimiser counts. `seed` is for the
    generator, `early_shift` what `EarlyPart` has. `critical` is one optimiser's critical index, `critical_indices` are
    those that one population is to select from.
    """

    start: Candidate
    seeds: Sequence[Candidate]
    parts: tuple[str, str]
    descent: Descent
    evaluations: int
    bound: float
    learn_attention: bool
    seed: Sequence[int]
    evolution: EvolutionOptions
    start_tokens: tuple[int, ...] = (0,)
    critical: int = 0
    critical_indices: tuple[int, ...] = ()
    early_shift: Sequence[float] = (0.0,)


def build(evaluator: Evaluator, config: SearchConfig, numbers: RopeNumbers, phase: Phase) -> Recorded:
    """The optimiser that `config.method` names."""
    return OPTIMISERS[config.method](evaluator, config, numbers, phase)


def build_index_search(arms: Mapping[int, Recorded], rounds: int, documents: int, part: str) -> Recorded:
    """The search among several critical indices, or the one strategy where there is one index."""
    return CriticalIndexSearch(arms, rounds, documents, part) if len(arms) > 1 else next(iter(arms.values()))


def _gradient(evaluator: Evaluator, config: SearchConfig, numbers: RopeNumbers, phase: Phase) -> GradientDescent:
    return GradientDescent(
        phase.start,
        config.gradient,
        phase.descent,
        _space(numbers, phase, config.gradient.constraint),
        learn_attention=phase.learn_attention,
        documents=evaluator.documents[phase.parts[0]],
        validation_documents=evaluator.documents[phase.parts[1]],
        turns=numbers.turns,
        generator=np.random.default_rng(phase.seed),
        parts=phase.parts,
        early=_early(evaluator, phase.early_shift) if phase.descent.early_steps else None,
    )


def _early(evaluator: Evaluator, shift: Sequence[float]) -> EarlyPart:
    ((part, documents),) = [each for each in evaluator.documents.items() if each[0].startswith(EARLY)]
    return EarlyPart(part, documents, np.asarray(shift))


def _cmaes(evaluator: Evaluator, config: SearchConfig, numbers: RopeNumbers, phase: Phase) -> CmaEs:
    return CmaEs(
        phase.start,
        config.cmaes,
        Sampling(phase.evaluations, phase.descent.checkpoints),
        _space(numbers, phase, config.cmaes.constraint),
        learn_attention=phase.learn_attention,
        documents=evaluator.documents[phase.parts[0]],
        validation_documents=evaluator.documents[phase.parts[1]],
        generator=np.random.default_rng(phase.seed),
        race=bool(config.race),
        parts=phase.parts,
    )


def _evolution(evaluator: Evaluator, config: SearchConfig, numbers: RopeNumbers, phase: Phase) -> Evolution:
    return Evolution(
        _grid(config, numbers, phase),
        phase.seeds,
        phase.evolution,
        documents=evaluator.documents[phase.parts[0]],
        evaluations=phase.evaluations,
        attention_factor=phase.start.attention_factor,
        generator=np.random.default_rng(phase.seed),
        part=phase.parts[0],
        race=bool(config.race),
    )


def _grid(config: SearchConfig, numbers: RopeNumbers, phase: Phase) -> Space:
    if not phase.critical_indices:
        return PaperSpace(numbers.pairs, phase.bound, config.step, phase.start_tokens)
    return CriticalSpace(
        numbers.pairs, phase.critical_indices, numbers.scale, phase.bound, config.step, phase.start_tokens
    )


def _space(numbers: RopeNumbers, phase: Phase, constraint: Constraint) -> LogSpace:
    return LogSpace(numbers.pairs, phase.critical, constraint, phase.bound)


OPTIMISERS: Mapping[str, Callable[[Evaluator, SearchConfig, RopeNumbers, Phase], Recorded]] = {
    "gradient": _gradient, "evolution": _evolution, "cmaes": _cmaes
}  # fmt: skip
