"""Inverse frequencies, wavelengths and the places where a window ends among them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope_export.errors import ScalingError
from longrope_export.rope.frequencies import critical_index, crossing, inverse_frequencies, wavelengths

LLAMA2: dict[str, Any] = {"rope_theta": 1e4, "rotary_dim": 128}
LLAMA3: dict[str, Any] = {"rope_theta": 5e5, "rotary_dim": 128}
PHI3: dict[str, Any] = {"rope_theta": 1e4, "rotary_dim": 96}


def test_inverse_frequencies_are_powers_of_the_base() -> None:
    assert inverse_frequencies(10000.0, 4).tolist() == pytest.approx([1.0, 0.01], rel=1e-15)
    assert inverse_frequencies(10000.0, 4).dtype == np.float64


def test_factors_divide() -> None:
    assert inverse_frequencies(10000.0, 4, [2.0, 4.0]).tolist() == pytest.approx([0.5, 0.0025], rel=1e-15)
    assert wavelengths(10000.0, 4, [2.0, 4.0]) == pytest.approx(2 * math.pi * np.array([2.0, 400.0]))


def test_wavelengths_match_published_periods() -> None:
    """LLaMA-2's periods as the Resonance RoPE paper rounds them, and Phi-3's."""
    periods = wavelengths(**LLAMA2)
    expected = {1: 7.25571, 8: 19.86918, 16: 62.83185, 32: 628.31853, 63: 54410.143}
    for index, value in expected.items():
        assert periods[index] == pytest.approx(value, rel=1e-6)
    assert int(wavelengths(**PHI3)[47]) == 51861
    assert round(wavelengths(**PHI3)[7]) == 24


@pytest.mark.parametrize(
    ("model", "length", "periods", "index", "position"),
    [
        (LLAMA2, 4096, 1, 46, 45.026881),
        (LLAMA3, 8192, 1, 35, 34.984119),
        (PHI3, 2048, 1, 31, 30.157801),
        (PHI3, 4096, 1, 34, 33.770161),
        (LLAMA3, 8192, 10, 24, None),
        (PHI3, 2048, 10, 19, None),
        (LLAMA2, 4096, 32, 21, 20.944482),
        (LLAMA3, 8192, 32, 19, 18.081135),
        (PHI3, 2048, 32, 13, 12.096001),
        (PHI3, 4096, 32, 16, 15.708361),
    ],
)
def test_critical_index_of_published_models(
    model: dict[str, Any], length: int, periods: float, index: int, position: float | None
) -> None:
    assert critical_index(**model, length=length, periods=periods) == index
    if position is not None:
        found = crossing(wavelengths(**model), length, periods)
        assert found == pytest.approx(position, abs=1e-6)


@given(
    theta=st.floats(10.0, 1e8),
    pairs=st.integers(2, 128),
    length=st.integers(2, 2**21),
    periods=st.floats(0.5, 64.0),
)
def test_critical_index_is_the_first_pair_with_too_long_a_period(
    theta: float, pairs: int, length: int, periods: float
) -> None:
    index = critical_index(theta, 2 * pairs, length, periods)
    slow = wavelengths(theta, 2 * pairs) * periods
    assert 0 <= index <= pairs
    assert (slow[:index] < length * (1 + 1e-9)).all()
    assert (slow[index:] > length * (1 - 1e-9)).all()


@given(theta=st.floats(10.0, 1e8), pairs=st.integers(2, 128), share=st.floats(-1.0, 3.0))
def test_crossing_inverts_the_wavelengths_also_beyond_both_ends(theta: float, pairs: int, share: float) -> None:
    length, position = 2 * math.pi * theta**share, share * pairs
    assert crossing(wavelengths(theta, 2 * pairs), length) == pytest.approx(position, abs=1e-6)


def test_crossing_follows_wavelengths_that_a_scaling_has_bent() -> None:
    periods = wavelengths(**LLAMA2, factors=[1.0] * 40 + [8.0] * 24)
    assert 39.0 < crossing(periods, 8192) < 40.0  # the unscaled crossing is 49.8; the step of ×8 moves it
    assert crossing(periods, float(periods[50])) == pytest.approx(50.0)


@pytest.mark.parametrize("theta", [1.0, 0.0, -5.0, math.nan, math.inf])
def test_a_base_not_above_one_is_refused(theta: float) -> None:
    with pytest.raises(ScalingError, match="rope_theta"):
        inverse_frequencies(theta, 64)


@pytest.mark.parametrize("dimension", [0, 1, 63, -2])
def test_an_odd_or_empty_rotary_dim_is_refused(dimension: int) -> None:
    with pytest.raises(ScalingError, match="rotary_dim"):
        wavelengths(1e4, dimension)


@pytest.mark.parametrize("factors", [[1.0], [1.0, 0.0], [1.0, math.nan], [1.0, -1.0], ["a", "b"], [[1.0, 2.0]]])
def test_bad_factors_are_refused(factors: list[float]) -> None:
    with pytest.raises(ScalingError, match="factors"):
        inverse_frequencies(1e4, 4, factors)


def test_impossible_lengths_and_flat_wavelengths_are_refused() -> None:
    with pytest.raises(ScalingError, match="length"):
        critical_index(1e4, 64, 0)
    with pytest.raises(ScalingError, match="periods"):
        critical_index(1e4, 64, 100, 0)
    with pytest.raises(ScalingError, match="two pairs"):
        crossing(wavelengths(1e4, 2), 100)
    with pytest.raises(ScalingError, match="grow"):
        crossing(np.array([100.0, 10.0]), 50)
