"""Our factors against transformers' own rope functions, and the completeness of the list of rope types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longrope_export.errors import ScalingError, UnsupportedModelError
from longrope_export.rope.frequencies import inverse_frequencies
from longrope_export.rope.hf_types import (
    ALIASES,
    HANDLED,
    REFUSED,
    factors_from_rope_parameters,
    rope_type_of,
)
from longrope_export.rope.methods import Factors, method_factors

WINDOW = 4096
ORIGINAL = 1024
SHORT, LONG = [1.0 + index / 64 for index in range(32)], [1.0 + index / 8 for index in range(32)]

CASES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "yarn-window": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": ORIGINAL},
    "yarn-betas": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
                   "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn-zero-beta": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
                       "beta_fast": 0, "beta_slow": None},
    "yarn-no-truncate": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
                         "truncate": False},
    "yarn-attention": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
                       "attention_factor": 1.3},
    "yarn-mscale": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
                    "mscale": 0.707, "mscale_all_dim": 1.2},
    "yarn-mscale-alone": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
                          "mscale": 0.707},
    "yarn-tiny-window": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4},
    "yarn-huge-window": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10**9},
    "yarn-no-original": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": ORIGINAL},
    "longrope": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
                 "original_max_position_embeddings": ORIGINAL},
    "longrope-factor": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 8.0,
                        "original_max_position_embeddings": ORIGINAL},
    "longrope-small": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 0.5,
                       "original_max_position_embeddings": ORIGINAL},
    "longrope-attention": {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
                           "attention_factor": 1.05, "original_max_position_embeddings": ORIGINAL},
}  # fmt: skip


def config(parameters: Mapping[str, Any], rope_theta: float) -> Any:
    return LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=WINDOW,
        rope_parameters={"rope_theta": rope_theta, **parameters},
    )  # fmt: skip


def ours(parameters: Mapping[str, Any], rope_theta: float = 1e4, length: int | None = None) -> Factors:
    return factors_from_rope_parameters(
        {"rope_theta": rope_theta, **parameters}, rotary_dim=64, max_position_embeddings=WINDOW, length=length
    )


@pytest.mark.parametrize("length", [None, ORIGINAL, ORIGINAL + 1, WINDOW, WINDOW + 1, 4 * WINDOW])
@pytest.mark.parametrize("rope_theta", [1e4, 5e5])
@pytest.mark.parametrize("case", CASES)
def test_equal_to_transformers(case: str, rope_theta: float, length: int | None) -> None:
    parameters = CASES[case]
    theirs, attention = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        config(parameters, rope_theta), torch.device("cpu"), seq_len=length
    )
    found = ours(parameters, rope_theta, length)
    np.testing.assert_allclose(
        inverse_frequencies(rope_theta, 64, found.factors), theirs.numpy().astype(np.float64), rtol=1e-6
    )
    assert found.attention_factor == pytest.approx(attention, rel=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "parameters"),
    [
        ("pi", {}, {"rope_type": "linear", "factor": 4.0}),
        ("yarn", {"beta_fast": 24.0, "beta_slow": 1.5, "truncate": False},
         {"rope_type": "yarn", "factor": 4.0, "beta_fast": 24.0, "beta_slow": 1.5, "truncate": False,
          "original_max_position_embeddings": WINDOW}),
        ("llama3", {"low_freq_factor": 2.0, "high_freq_factor": 6.0},
         {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 6.0,
          "original_max_position_embeddings": WINDOW}),
        ("dynamic-ntk", {"factor": 2.0, "current_length": 3 * WINDOW},
         {"rope_type": "dynamic", "factor": 2.0}),
    ],
)  # fmt: skip
def test_methods_equal_transformers(method: str, options: dict[str, Any], parameters: dict[str, Any]) -> None:
    found = method_factors(
        method, rope_theta=5e5, rotary_dim=64, original_max_position_embeddings=WINDOW,
        max_position_embeddings=4 * WINDOW, **options,
    )  # fmt: skip
    theirs, attention = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](
        config(parameters, 5e5), torch.device("cpu"), seq_len=3 * WINDOW
    )
    np.testing.assert_allclose(
        inverse_frequencies(5e5, 64, found.factors), theirs.numpy().astype(np.float64), rtol=1e-6
    )
    assert found.attention_factor == pytest.approx(attention, rel=1e-12)


def test_ntk_is_dynamic_ntk_at_the_target_length() -> None:
    theirs, _ = ROPE_INIT_FUNCTIONS["dynamic"](
        config({"rope_type": "dynamic", "factor": 1.0}, 1e4), torch.device("cpu"), seq_len=4 * WINDOW
    )
    found = method_factors(
        "ntk", rope_theta=1e4, rotary_dim=64, original_max_position_embeddings=WINDOW,
        max_position_embeddings=4 * WINDOW,
    )  # fmt: skip
    np.testing.assert_allclose(
        inverse_frequencies(1e4, 64, found.factors), theirs.numpy().astype(np.float64), rtol=1e-6
    )


def test_every_rope_type_that_transformers_knows_is_handled_or_refused() -> None:
    known = set(ROPE_INIT_FUNCTIONS) | {"default"}
    assert known - set(HANDLED) - set(REFUSED) == set(), "transformers has a new rope type: handle or refuse it"
    assert set(HANDLED) & set(REFUSED) == set()
    assert {case["rope_type"] for case in CASES.values()} | {"default"} == set(HANDLED)
    for name in REFUSED:
        with pytest.raises(UnsupportedModelError, match=name):
            ours({"rope_type": name, "factor": 2.0})


def test_default_is_the_identity() -> None:
    for parameters in (None, {}, {"rope_type": "default"}, {"type": "default"}, {"rope_type": None}):
        found = factors_from_rope_parameters(parameters, rotary_dim=64, max_position_embeddings=WINDOW)
        assert found.is_identity
        assert len(found.factors) == 32
    assert not ours(CASES["linear"]).is_identity
    assert not Factors(np.ones(2), 1.1).is_identity


def test_legacy_names_are_understood() -> None:
    assert rope_type_of({"type": "su"}) == "longrope"
    assert rope_type_of({"type": "linear"}) == "linear"
    assert rope_type_of({"type": "mrope", "mrope_section": [16, 24, 24]}) == "default"
    old = {
        "type": "su",
        "short_factor": SHORT,
        "long_factor": LONG,
        "original_max_position_embeddings": ORIGINAL,
    }
    assert ours(old, length=WINDOW).factors.tolist() == LONG


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "nope"}, "'nope'"),
        ({"rope_type": 7}, "'7'"),
        ({"type": "mrope"}, "'mrope'"),
        ({"full_attention": {"rope_type": "linear"}, "sliding_attention": {}}, "nested .*full_attention"),
        ({"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0}, "alpha"),
        ({"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}, "llama_4_scaling_beta"),
        ({**CASES["longrope"], "short_mscale": 1.5}, "short_mscale"),
        ({**CASES["longrope"], "long_mscale": 1.5}, "long_mscale"),
    ],
)
def test_what_cannot_be_turned_into_factors_is_refused_by_name(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        ours(parameters)


def test_mscales_equal_to_the_attention_factor_are_accepted() -> None:
    value = math.sqrt(1 + math.log(4) / math.log(ORIGINAL))
    assert ours({**CASES["longrope"], "short_mscale": value, "long_mscale": value}).attention_factor == value


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "linear"}, "factor = None"),
        ({"rope_type": "linear", "factor": 0}, "factor = 0"),
        ({"rope_type": "linear", "factor": -2.0}, "factor"),
        ({"rope_type": "linear", "factor": math.nan}, "factor"),
        ({"rope_type": "linear", "factor": math.inf}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "linear", "factor": "4"}, "factor"),
        ({**CASES["llama3"], "high_freq_factor": None}, "high_freq_factor"),
        ({**CASES["llama3"], "high_freq_factor": 1.0}, "low_freq_factor"),
        ({**CASES["yarn"], "attention_factor": 0.0}, "attention_factor"),
        ({**CASES["longrope"], "short_factor": None}, "short_factor"),
        ({**CASES["longrope"], "short_factor": SHORT[:-1]}, "short_factor has 31 values"),
        ({**CASES["longrope"], "short_factor": [*SHORT[:-1], 0.0]}, "short_factor"),
        ({**CASES["longrope"], "short_factor": "1" * 32}, "short_factor"),
        ({**CASES["longrope"], "short_factor": [[1.0]] * 32}, "short_factor"),
        ({**CASES["longrope"], "original_max_position_embeddings": 1}, "greater than 1"),
        ({**CASES["yarn"], "rope_theta": 1.0}, "rope_theta"),
        ({**CASES["yarn"], "rope_theta": None}, "rope_theta"),
    ],
)
def test_bad_values_are_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ScalingError, match=message):
        ours(parameters)


def test_the_documentation_lists_every_rope_type() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    rows = text.split("## Rope types")[1]
    for name in {*HANDLED, *REFUSED, *ALIASES} - {"none"}:
        assert f"`{name}`" in rows, name
    for name, reason in REFUSED.items():
        assert f"| `{name}` | refused: {reason} |" in rows
