"""The space of log λ: LongRoPE2's structure, its gradient, and the constraints."""

from __future__ import annotations

import numpy as np
import pytest

from longrope_export.errors import ScalingError
from longrope_export.rope.formulas import longrope2
from longrope_export.search.strategies.log_space import LogSpace, isotonic


@pytest.mark.parametrize("critical", [0, 1, 3, 7])
def test_below_the_critical_pair_the_others_follow_as_in_longrope2(critical: int) -> None:
    tail = np.array([2.5, 3.0, 2.8, 9.0, 4.0, 5.0, 6.0, 7.0])[critical:]
    expanded = np.exp(LogSpace(8, critical).expand(np.log(tail)))
    np.testing.assert_allclose(expanded, longrope2(8, critical, tail), rtol=1e-12)
    np.testing.assert_allclose(LogSpace(8, critical).restrict(expanded), tail, rtol=1e-12)


@pytest.mark.parametrize("critical", [0, 1, 3, 7])
def test_the_gathered_gradient_is_the_one_of_the_free_values(critical: int) -> None:
    generator = np.random.default_rng(0)
    space, gradient, step = LogSpace(8, critical), generator.normal(size=8), generator.normal(size=8 - critical)
    assert space.size == len(step)
    assert space.gather(gradient) @ step == pytest.approx(gradient @ space.expand(step))


@pytest.mark.parametrize("critical", [0, 3])
@pytest.mark.parametrize(("constraint", "top"), [("monotone", np.inf), ("paper", np.log(4.2))])
def test_projected_values_give_factors_that_keep_to_the_constraint(constraint: str, top: float, critical: int) -> None:
    space = LogSpace(8, critical, constraint, 4.2)  # type: ignore[arg-type]
    for seed in range(20):
        free = np.random.default_rng(seed).normal(0.0, 2.0, space.size)
        projected = space.project(free)
        expanded = space.expand(projected)
        assert (np.diff(expanded) >= -1e-12).all()
        assert expanded.max() <= top + 1e-12
        if critical or constraint == "paper":
            assert expanded.min() >= 0.0
        np.testing.assert_allclose(space.project(projected), projected)


def test_without_a_constraint_nothing_is_moved() -> None:
    free = np.array([3.0, -1.0, 2.0])
    assert LogSpace(3).project(free) is free


@pytest.mark.parametrize("critical", [-1, 8])
def test_an_index_that_no_pair_has_is_refused(critical: int) -> None:
    with pytest.raises(ScalingError, match="critical index"):
        LogSpace(8, critical)


def test_isotonic_is_the_nearest_monotone_sequence() -> None:
    assert isotonic(np.array([1.0, 3.0, 2.0, 2.0, 5.0])).tolist() == pytest.approx([1.0, 7 / 3, 7 / 3, 7 / 3, 5.0])
    values = np.random.default_rng(0).normal(size=6)
    ours = isotonic(values)
    assert (np.diff(ours) >= 0).all()
    for seed in range(500):
        other = np.sort(ours + np.random.default_rng(seed).normal(size=6) * 0.1)
        assert ((ours - values) ** 2).sum() <= ((other - values) ** 2).sum() + 1e-12
