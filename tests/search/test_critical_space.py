"""LongRoPE2's population: what it proposes has the structure, within the paper's bounds, and its index is selected."""

from __future__ import annotations

import numpy as np
import pytest
from bowl import DOCUMENTS, Bowl, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope_export.errors import ScalingError
from longrope_export.search.config import SearchConfig
from longrope_export.search.executors.local import InProcess
from longrope_export.search.protocol import SEARCH, Trial
from longrope_export.search.space import Individual, RopeNumbers
from longrope_export.search.strategies.critical_space import CriticalSpace
from longrope_export.search.strategies.evolution import Evolution, EvolutionOptions

INDICES = (1, 3, 5, 7)
SPACE = CriticalSpace(8, INDICES, 4.0, 8.0, start_tokens=(0, 4, 16))
# As LLaMA3-8B.
LLAMA3 = RopeNumbers(rope_theta=5e5, rotary_dim=128, window=8192, target=131072)


def _check(space: CriticalSpace, individual: Individual) -> None:
    """λ_i = λ_c^(i/c) below the index; from it on grid points from s to the bound that do not fall."""
    critical = individual.critical
    assert critical in space.indices
    factors = np.array(space.candidate(individual, 1.0).factors)
    np.testing.assert_allclose(factors[:critical], factors[critical] ** (np.arange(critical) / critical), rtol=2e-7)
    free = factors[critical:]
    assert (np.diff(free) >= 0).all()
    assert space.scale - 1e-6 <= free[0] <= free[-1] <= space.bound + 1e-6
    np.testing.assert_allclose(free, 1.0 + np.rint((free - 1.0) / space.step) * space.step, rtol=2e-7)
    assert individual.start_tokens in space.start_tokens


@given(seed=st.integers(0, 2**32), probability=st.floats(0.01, 1.0), scale=st.floats(1.5, 40.0))
@settings(max_examples=40, deadline=None)
def test_every_individual_has_the_structure_and_keeps_to_the_bounds(
    seed: int, probability: float, scale: float
) -> None:
    space = CriticalSpace(24, (0, 3, 9, 23), scale, 2.0 * scale, start_tokens=(0, 7))
    generator = np.random.default_rng(seed)
    population = space.first([], 6, generator)
    for _ in range(20):
        first, second = (population[int(index)] for index in generator.integers(len(population), size=2))
        mutant, child = space.mutate(first, probability, generator), space.cross(first, second, generator)
        # Algorithm 2 keeps the index; a child has one of its parents'.
        assert mutant.critical == first.critical
        assert child.critical in (first.critical, second.critical)
        lowest = [min(pair) for pair in zip(first.genes, second.genes)][child.critical :]
        highest = [max(pair) for pair in zip(first.genes, second.genes)][child.critical :]
        free = child.genes[child.critical :]
        assert all(low <= gene for low, gene in zip(np.maximum.accumulate(lowest), free))
        assert all(gene <= max(high, space.low) for gene, high in zip(free, highest))
        population += [mutant, child]
    for individual in population:
        _check(space, individual)


def test_the_population_begins_as_in_the_paper() -> None:
    """Every index by turns, and from there on one λ between s and 2 s."""
    population = SPACE.first([], 64, np.random.default_rng(0))
    assert [individual.critical for individual in population] == list(INDICES) * 16
    tails = np.array([individual.genes[individual.critical :][0] for individual in population])
    assert all(len(set(individual.genes[individual.critical :])) == 1 for individual in population)
    assert SPACE.low == 300 <= tails.min() < 340
    assert 660 < tails.max() <= SPACE.top == 700
    assert {individual.start_tokens for individual in population} == {0}


def test_mutations_move_every_free_gene_and_the_pairs_below_follow() -> None:
    generator = np.random.default_rng(0)
    parents = SPACE.first([], 4, generator)
    for parent in parents:
        mutants = [parent] * 200
        for _ in range(3):
            mutants = [SPACE.mutate(mutant, 0.3, generator) for mutant in mutants]
        changed = np.mean([[a != b for a, b in zip(each.genes, parent.genes)] for each in mutants], axis=0)
        assert changed[parent.critical :].min() > 0.05
        assert not parent.critical > 1 or changed[1 : parent.critical].min() > 0.05
        assert {mutant.start_tokens for mutant in mutants} == {0, 4, 16}


def _evolution(goal: np.ndarray, seed: int = 0) -> tuple[Evolution, list[Trial]]:
    strategy = Evolution(
        SPACE, [], EvolutionOptions(population=32, iterations=30, mutations=16, crossovers=16, parents=16),
        documents=DOCUMENTS, evaluations=10_000, attention_factor=1.1, generator=np.random.default_rng(seed),
    )  # fmt: skip
    return strategy, serve(strategy, InProcess(Bowl(goal=goal)))


def test_the_population_selects_the_index_that_can_hold_the_optimum() -> None:
    for index in (3, 5):
        free = np.linspace(np.log(4.5), np.log(7.0), 8 - index)
        goal = np.concatenate([free[0] * np.arange(index) / index, free])
        strategy, seen = _evolution(goal)
        best = np.log(strategy.finalists()[0].factors)
        assert np.abs(best - goal).max() < 0.1
        assert set(strategy.losses) == set(INDICES)
        # With λ ≥ s from there on a smaller index cannot hold what lies below s, nor a larger one what bends.
        assert min(strategy.losses, key=strategy.losses.__getitem__) == index
        assert strategy.losses[index] == strategy.history[-1]
        assert len({trial.candidate for trial in seen}) == 32 + 30 * 32
        assert all(not trial.gradient and trial.part == SEARCH for trial in seen)


def test_a_seed_gives_one_result_and_another_seed_another() -> None:
    goal = np.linspace(0.0, 2.0, 8)
    (_, first), (_, again), (_, other) = (_evolution(goal, seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("change", "word"),
    [({"bound": 3.9}, "bound is 3.9"), ({"bound": float("nan")}, "bound"), ({"step": 0.0}, "step")],
)
def test_an_impossible_space_is_refused(change: dict[str, float], word: str) -> None:
    with pytest.raises(ScalingError, match=word):
        CriticalSpace(**{"pairs": 8, "indices": (3,), "scale": 4.0, "bound": 8.0, **change})  # type: ignore[arg-type]


def test_the_search_s_settings_are_the_paper_s() -> None:
    config = SearchConfig(strategy="critical-dim", optimiser="evolution").resolve(LLAMA3, "hf")
    # LongRoPE2, §3.2 and equation 7: every index from 24 to 35; λ from s to 2 s; the attention factor of LongRoPE.
    assert config.critical_indices == tuple(range(24, 36))
    assert config.bound == 2.0
    assert config.attention_factor(LLAMA3) == pytest.approx((1 + np.log(16) / np.log(8192)) ** 0.5)
    assert config.evolution.evaluations == 1344
    # A given one counts; Algorithm 1 and the other optimisers keep theirs.
    given = SearchConfig(strategy="critical-dim", optimiser="evolution", bound=1.5, critical_indices=(30,))
    assert (given.resolve(LLAMA3, "hf").bound, given.resolve(LLAMA3, "hf").critical_indices) == (1.5, (30,))
    assert SearchConfig(strategy="evolution").resolve(LLAMA3, "hf").bound == 1.25
    other = SearchConfig(strategy="critical-dim").resolve(LLAMA3, "hf")
    assert (other.bound, len(other.critical_indices or ()), other.attention) == (1.25, 4, "method")


def test_needles_are_in_its_objective_as_in_the_paper(tiny_tokenizer: object) -> None:
    config = SearchConfig(strategy="critical-dim", optimiser="evolution")
    assert "needle" in config.with_texts(9, tiny_tokenizer, 2048).mixture.weights
