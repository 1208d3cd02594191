"""The record made from a method, and composition with a scaling that the model already carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling
from longrope_export.errors import ScalingError, UnsupportedModelError
from longrope_export.rope import formulas
from longrope_export.rope.frequencies import wavelengths
from longrope_export.rope.methods import (
    METHODS,
    Factors,
    compose,
    existing_from_scaling,
    method_factors,
    method_scaling,
)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
LLAMA2: dict[str, Any] = {"rope_theta": 1e4, "rotary_dim": 128, "original_max_position_embeddings": 4096}
LLAMA3: dict[str, Any] = {"rope_theta": 5e5, "rotary_dim": 128, "original_max_position_embeddings": 8192}
STATIC = [name for name in METHODS if name not in ("abf", "dynamic-ntk")]


def factors(name: str, model: dict[str, Any], scale: float, **options: Any) -> Factors:
    target = round(model["original_max_position_embeddings"] * scale)
    return method_factors(name, **model, max_position_embeddings=target, **options)


def record(name: str, **options: Any) -> RopeScaling:
    return method_scaling(name, **LLAMA2, max_position_embeddings=16384, **options)


@pytest.mark.parametrize("name", STATIC)
def test_a_static_method_is_one_set_for_every_length(name: str) -> None:
    scaling = record(name)
    assert scaling.is_static
    assert scaling.long_factor == pytest.approx(tuple(factors(name, LLAMA2, 4).factors), rel=1e-7)
    assert (scaling.factor, scaling.rope_theta, scaling.rotary_dim) == (4.0, 1e4, 128)
    assert scaling.provenance["method"] == name


def test_short_original_keeps_short_sequences_as_they_are() -> None:
    scaling = record("yarn", short="original")
    assert scaling.short_factor == (1.0,) * 64
    assert scaling.short_attention_factor == 1.0
    assert scaling.long_factor == record("yarn").long_factor
    assert scaling.long_attention_factor == pytest.approx(1.138629, abs=1e-6)
    assert scaling.provenance["short"] == "original"


def test_dynamic_ntk_leaves_short_sequences_alone_unless_told_otherwise() -> None:
    assert record("dynamic-ntk").short_factor == (1.0,) * 64
    assert record("dynamic-ntk").long_factor == record("ntk").long_factor
    assert record("dynamic-ntk", short="same").is_static


def test_options_reach_the_record_and_its_provenance() -> None:
    scaling = record("longrope2", critical_index=62, tail=np.array([4.5, 5.0]), attention_factor=1.1)
    assert scaling.long_factor[62:] == (4.5, 5.0)
    assert scaling.long_attention_factor == pytest.approx(1.1)
    assert scaling.provenance["options"] == {
        "attention_factor": 1.1, "critical_index": 62, "tail": [4.5, 5.0]
    }  # fmt: skip
    assert RopeScaling.from_json(scaling.to_json()) == scaling


def test_options_that_are_not_given_leave_no_trace() -> None:
    plain = record("yarn")
    assert record("yarn", attention_factor=None) == plain
    assert "options" not in plain.provenance
    assert "composed_with" not in plain.provenance


def test_an_unknown_short_is_refused() -> None:
    with pytest.raises(ScalingError, match="short is 'none'"):
        record("pi", short="none")


# ---------------------------------------------------------------- composition

LLAMA31: dict[str, Any] = {"rope_theta": 5e5, "rotary_dim": 128, "original_max_position_embeddings": 131072}


def llama31_existing() -> Factors:
    return factors("llama3", LLAMA3, 8)


def test_compose_multiplies() -> None:
    assert compose(np.array([1.0, 2.0]), np.array([3.0, 4.0])).tolist() == [3.0, 8.0]
    with pytest.raises(ScalingError, match="new factors has 3 values"):
        compose(np.ones(2), np.ones(3))


def test_pi_on_pi_is_pi() -> None:
    first = factors("pi", LLAMA2, 4)
    again = method_scaling(
        "pi",
        rope_theta=1e4,
        rotary_dim=128,
        original_max_position_embeddings=16384,
        max_position_embeddings=32768,
        existing=first,
    )
    assert again.long_factor == (8.0,) * 64


def test_llama31_four_times_further() -> None:
    """Fast pairs stay, pairs that llama3 divided by 8 and that never complete a turn in 131,072 end at 32."""
    existing = llama31_existing()
    scaling = method_scaling("yarn", **LLAMA31, max_position_embeddings=524288, existing=existing, short="original")
    assert scaling.short_factor == pytest.approx(tuple(existing.factors), rel=1e-7)
    assert scaling.short_attention_factor == 1.0
    assert scaling.original_max_position_embeddings == 131072
    stretched = wavelengths(5e5, 128, existing.factors)
    total = np.array(scaling.long_factor)
    assert total[stretched > 131072 * 1.15] == pytest.approx(32.0)
    assert total[stretched < 131072 / 40] == pytest.approx(existing.factors[stretched < 131072 / 40])
    assert scaling.provenance["composed_with"]["factors"] == existing.factors.tolist()


def test_wavelength_methods_see_the_stretched_wavelengths() -> None:
    """A pair that llama3 made 8 times slower is past YaRN's ramp although its unscaled period is not."""
    existing = llama31_existing()
    aware = method_factors("yarn", **LLAMA31, max_position_embeddings=524288, existing=existing).factors
    blind = method_factors("yarn", **LLAMA31, max_position_embeddings=524288).factors
    stretched = wavelengths(5e5, 128, existing.factors)
    first_slow = int(np.flatnonzero(stretched > 131072)[0])
    assert first_slow == 39
    assert aware[first_slow] == 4.0
    assert blind[first_slow] < 2.0
    for name in ("critical-dim", "longrope2", "llama3"):
        tail = method_factors(name, **LLAMA31, max_position_embeddings=524288, existing=existing).factors
        assert (tail[first_slow:] >= 4.0 - 1e-9).all(), name


def test_yarn_further() -> None:
    """Divisors multiply to 16, attention factors multiply, the switch is at the present window."""
    existing = factors("yarn", LLAMA2, 4)
    scaling = method_scaling(
        "yarn",
        rope_theta=1e4,
        rotary_dim=128,
        original_max_position_embeddings=16384,
        max_position_embeddings=65536,
        existing=existing,
        short="original",
    )
    assert scaling.long_factor[-1] == pytest.approx(16.0)
    assert scaling.long_factor[0] == 1.0
    assert scaling.short_attention_factor == pytest.approx(1.138629, abs=1e-6)
    assert scaling.long_attention_factor == pytest.approx(1.138629**2, abs=1e-5)
    assert existing_from_scaling(record("yarn")).factors == pytest.approx(existing.factors, rel=1e-7)  # type: ignore[union-attr]


def test_existing_scaling_of_another_size_is_refused() -> None:
    with pytest.raises(ScalingError, match="32 values"):
        record("pi", existing=Factors(np.ones(32)))


def test_existing_sets_that_differ_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="longrope factors that differ for short and long"):
        existing_from_scaling(record("yarn", short="original"))
    with pytest.raises(UnsupportedModelError, match="first 4 tokens"):
        existing_from_scaling(
            RopeScaling(
                rope_theta=1e4, rotary_dim=4, original_max_position_embeddings=8, max_position_embeddings=16,
                long_factor=(1, 2), short_factor=(1, 2), long_start_tokens=4, short_start_tokens=4,
            )
        )  # fmt: skip
    assert existing_from_scaling(None) is None


def test_the_documented_composition_numbers() -> None:
    assert "1.2965" in DOCUMENT
    assert formulas.yarn_attention_factor(4) ** 2 == pytest.approx(1.2965, abs=5e-5)
    assert formulas.yarn_attention_factor(16) == pytest.approx(1.2773, abs=5e-5)
    blind = np.flatnonzero(wavelengths(5e5, 128) > 131072)[0]
    aware = np.flatnonzero(wavelengths(5e5, 128, llama31_existing().factors) > 131072)[0]
    assert (blind - aware, "ten more pairs" in DOCUMENT) == (10, True)
