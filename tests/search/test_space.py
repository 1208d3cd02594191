"""The search space: what may be proposed, and that it stays legal without rejections."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope_export.errors import ScalingError
from longrope_export.rope.methods import method_scaling
from longrope_export.search.space import START_TOKENS, Candidate, Individual, PaperSpace, RopeNumbers, closed_form

NUMBERS = RopeNumbers(rope_theta=10000.0, rotary_dim=48, window=256, target=2048)
SPACE = PaperSpace(24, 10.0)


def _legal(space: PaperSpace, individual: Individual) -> bool:
    genes = individual.genes
    return (
        all(0 <= gene <= space.top for gene in genes)
        and list(genes) == sorted(genes)
        and individual.start_tokens in space.start_tokens
    )


@given(seed=st.integers(0, 2**32), probability=st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_mutants_and_crossovers_stay_on_the_monotone_grid(seed: int, probability: float) -> None:
    generator = np.random.default_rng(seed)
    parents = [SPACE.nearest(closed_form(name, NUMBERS).factors) for name in ("pi", "ntk", "yarn")]
    for _ in range(20):
        first, second = (parents[int(index)] for index in generator.integers(len(parents), size=2))
        child = SPACE.cross(first, second, generator)
        assert _legal(SPACE, child)
        assert all(min(pair) <= gene <= max(pair) for gene, *pair in zip(child.genes, first.genes, second.genes))
        mutant = SPACE.mutate(child, probability, generator)
        assert _legal(SPACE, mutant)
        parents.append(mutant)


def test_the_paper_s_bounds_and_start_tokens() -> None:
    space = PaperSpace(24, 1.25 * 8)
    assert space.top == 900
    assert space.start_tokens == (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
    candidate = space.candidate(Individual((0,) * 23 + (900,), 64), 1.5)
    assert (candidate.factors[0], candidate.factors[-1]) == (1.0, 10.0)
    assert (candidate.attention_factor, candidate.start_tokens) == (1.5, 64)


def test_mutations_reach_every_gene_also_inside_flat_runs_and_every_start_token() -> None:
    generator = np.random.default_rng(0)
    for name in ("pi", "yarn"):
        seed = SPACE.nearest(closed_form(name, NUMBERS).factors)
        mutants = [seed] * 200
        for _ in range(3):
            mutants = [SPACE.mutate(mutant, 0.3, generator) for mutant in mutants]
        changed = np.mean([[a != b for a, b in zip(mutant.genes, seed.genes)] for mutant in mutants], axis=0)
        assert changed.min() > 0.02
        assert {mutant.start_tokens for mutant in mutants} == set(START_TOKENS)


def test_a_higher_mutation_probability_changes_more_genes() -> None:
    ntk = SPACE.nearest(closed_form("ntk", NUMBERS).factors)

    def share(probability: float) -> float:
        generator = np.random.default_rng(0)
        mutants = [SPACE.mutate(ntk, probability, generator) for _ in range(100)]
        return float(np.mean([[a != b for a, b in zip(mutant.genes, ntk.genes)] for mutant in mutants]))

    assert share(0.1) < share(0.3) < share(0.9)


def test_nearest_rounds_clips_and_repairs() -> None:
    space = PaperSpace(4, 2.0, step=0.1)
    assert space.nearest([0.5, 1.26, 1.14, 9.0]).genes == (0, 3, 3, 10)


@pytest.mark.parametrize(
    ("keywords", "word"),
    [
        ({"step": 0.0}, "step"),
        ({"step": float("nan")}, "step"),
        ({"bound": 1.0}, "bound"),
        ({"start_tokens": ()}, "start tokens"),
        ({"start_tokens": (-1,)}, "start tokens"),
    ],
)
def test_an_impossible_space_is_refused(keywords: dict[str, object], word: str) -> None:
    with pytest.raises(ScalingError, match=word):
        PaperSpace(**{"pairs": 4, "bound": 2.0, **keywords})  # type: ignore[arg-type]


def test_candidates_hold_what_a_file_holds() -> None:
    candidate = Candidate((1.01, 2.0), attention_factor=1.1)
    assert candidate.factors[0] == float(np.float32(1.01)) != 1.01
    assert candidate.attention_factor == float(np.float32(1.1))


def test_a_window_that_does_not_grow_is_refused() -> None:
    with pytest.raises(ScalingError, match="from 256 to 256"):
        RopeNumbers(rope_theta=10000.0, rotary_dim=48, window=256, target=256)


@pytest.mark.parametrize("name", ["pi", "ntk", "yarn", "critical-dim"])
def test_a_closed_form_on_top_of_a_scaling_is_the_one_that_extend_writes(name: str) -> None:
    base = tuple(float(value) for value in np.linspace(1.0, 4.0, 24))
    numbers = RopeNumbers(
        rope_theta=10000.0, rotary_dim=48, window=256, target=2048, base_factors=base, base_attention_factor=1.1
    )
    record = numbers.record(closed_form(name, numbers), numbers.unchanged(), {})
    expected = method_scaling(
        name, rope_theta=10000.0, rotary_dim=48, original_max_position_embeddings=256,
        max_position_embeddings=2048, existing=numbers.existing, short="original",
    )  # fmt: skip
    np.testing.assert_allclose(record.long_factor, expected.long_factor, rtol=3e-7)
    np.testing.assert_allclose(record.short_factor, base, rtol=1e-7)
    assert record.long_attention_factor == pytest.approx(expected.long_attention_factor, rel=1e-6)
    assert record.short_attention_factor == pytest.approx(1.1)
    assert closed_form(name, numbers, attention_factor=1.25).attention_factor == 1.25


def test_turns_are_those_of_the_present_frequencies() -> None:
    plain = RopeNumbers(rope_theta=10000.0, rotary_dim=48, window=256, target=2048)
    scaled = RopeNumbers(rope_theta=10000.0, rotary_dim=48, window=256, target=2048, base_factors=(2.0,) * 24)
    assert plain.turns[0] == pytest.approx(256 / (2 * np.pi))
    np.testing.assert_allclose(scaled.turns, plain.turns / 2)
