"""The record read from config.json, against what transformers computes from the same file."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longrope_export.errors import InputFileError, LongRopeError, ScalingError, UnsupportedModelError
from longrope_export.formats.hf_scaling import RECORD_KEY, scaling_from_config
from longrope_export.rope.frequencies import inverse_frequencies
from longrope_export.scaling import RopeScaling

LONG = [1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0]
SHORT = [1.0, 1.0, 1.0, 1.0625, 1.125, 1.25, 1.25, 1.5]
BASE: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 50000.0,
    "original_max_position_embeddings": 32,
    "factor": 4.0,
    "long_factor": LONG,
    "short_factor": SHORT,
}


def without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def phi(**more: Any) -> dict[str, Any]:
    return {
        **without(BASE, "head_dim"),
        "model_type": "phi3",
        "rope_theta": 50000.0,
        "pad_token_id": 0,
        **more,
    }


OLD = {"type": "longrope", **without(ROPE, "rope_type", "rope_theta")}
GEMMA = {**BASE, "model_type": "gemma3_text", "layer_types": ["full_attention"]}
CASES: dict[str, dict[str, Any]] = {
    "rope_parameters": {**BASE, "rope_parameters": ROPE},
    "explicit attention factor": {**BASE, "rope_parameters": {**ROPE, "attention_factor": 1.3}},
    "attention factor below 1": {**BASE, "rope_parameters": {**ROPE, "attention_factor": 0.5}},
    "no factor": {**BASE, "rope_parameters": without(ROPE, "factor")},
    "factor that is not the ratio": {**BASE, "rope_parameters": {**ROPE, "factor": 8.0}},
    "factor of one": {**BASE, "rope_parameters": {**ROPE, "factor": 1.0}},
    "integers": {
        **BASE,
        "rope_parameters": {**ROPE, "factor": 4, "rope_theta": 50000, "long_factor": [4] * 8},
    },
    "old names": {**BASE, "rope_theta": 50000.0, "rope_scaling": OLD},
    "old names without theta": {**BASE, "rope_scaling": OLD},
    "both, equal": {**BASE, "rope_theta": 50000.0, "rope_parameters": ROPE, "rope_scaling": ROPE},
    "old names beside a theta that is lost": {**BASE, "rope_parameters": ROPE, "rope_scaling": {**OLD}},
    "rope_scaling null": {**BASE, "rope_parameters": ROPE, "rope_scaling": None},
    "inner theta wins": {**BASE, "rope_theta": 777.0, "rope_parameters": ROPE},
    "top-level theta": {**BASE, "rope_theta": 777.0, "rope_parameters": without(ROPE, "rope_theta")},
    "original missing": {
        **BASE,
        "rope_parameters": without(ROPE, "original_max_position_embeddings"),
    },
    "top-level original overrides": {**BASE, "original_max_position_embeddings": 64, "rope_parameters": ROPE},
    "type and rope_type": {**BASE, "rope_parameters": {**ROPE, "type": "longrope"}},
    "no head_dim": {**without(BASE, "head_dim"), "rope_parameters": ROPE},
    "phi3": phi(original_max_position_embeddings=32, rope_scaling={**OLD}),
    "phi3 without original": phi(max_position_embeddings=8192, rope_scaling={**OLD}),
    "phi3, partial": phi(
        num_attention_heads=1,
        partial_rotary_factor=0.5,
        original_max_position_embeddings=32,
        rope_scaling={**OLD},
    ),
    "phi3, partial inside": phi(
        num_attention_heads=1,
        original_max_position_embeddings=32,
        rope_parameters={**ROPE, "partial_rotary_factor": 0.5},
    ),
    "gemma3 nested": {**GEMMA, "rope_parameters": {"full_attention": ROPE, "sliding_attention": None}},
    "gemma3 old names": {**GEMMA, "rope_theta": 50000.0, "rope_scaling": OLD},
}


def transformers_rope(config: dict[str, Any], folder: Path, length: int | None) -> tuple[torch.Tensor, float]:
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(folder)
    layer_type = "full_attention" if config["model_type"].startswith("gemma3") else None
    frequencies, attention = ROPE_INIT_FUNCTIONS["longrope"](loaded, None, length, layer_type)
    return frequencies, attention


@pytest.mark.parametrize("name", CASES)
def test_the_record_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    config = CASES[name]
    scaling = scaling_from_config(config)
    assert scaling is not None
    original = scaling.original_max_position_embeddings
    assert scaling.max_position_embeddings == config["max_position_embeddings"]
    for factors, length in ((scaling.short_factor, original), (scaling.long_factor, original + 1)):
        expected, attention = transformers_rope(config, tmp_path, length)
        ours = inverse_frequencies(scaling.rope_theta, scaling.rotary_dim, np.array(factors))
        torch.testing.assert_close(torch.from_numpy(ours).float(), expected, rtol=1e-6, atol=0)
        assert scaling.long_attention_factor == pytest.approx(attention, rel=1e-6)
        assert scaling.short_attention_factor == scaling.long_attention_factor


def test_the_formula_is_filled_in_from_factor_and_original() -> None:
    scaling = scaling_from_config(CASES["factor that is not the ratio"])
    assert scaling is not None
    assert scaling.long_attention_factor == pytest.approx(math.sqrt(1 + math.log(8) / math.log(32)), rel=1e-7)
    assert scaling.factor == 4.0


def test_plain_and_other_rope_types_carry_no_record() -> None:
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    changes: list[dict[str, Any]] = [{}, {"rope_parameters": {}}, {"rope_theta": 5e5}, {"rope_parameters": linear}]
    for more in changes:
        assert scaling_from_config({**BASE, **more}) is None
    flat = {**GEMMA, "rope_parameters": ROPE}
    assert scaling_from_config(flat) is None, "transformers ignores a flat rope_parameters for gemma3"


def record() -> RopeScaling:
    return RopeScaling(
        rope_theta=50000.0,
        rotary_dim=16,
        original_max_position_embeddings=32,
        max_position_embeddings=128,
        long_factor=tuple(LONG),
        short_factor=tuple(SHORT),
        long_attention_factor=1.1,
        short_attention_factor=1.05,
        long_start_tokens=4,
        sets={64: tuple(SHORT)},
        provenance={"method": "test"},
    )


def carrying(scaling: RopeScaling, **rope: Any) -> dict[str, Any]:
    parameters = {**ROPE, "attention_factor": scaling.long_attention_factor, **rope}
    return {**BASE, "rope_parameters": parameters, RECORD_KEY: scaling.to_dict()}


def test_our_own_record_comes_back_whole() -> None:
    assert scaling_from_config(carrying(record())) == record()
    inner = carrying(record())
    assert scaling_from_config({"model_type": "gemma3", "text_config": inner}) == record()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"long_factor": [*LONG[:-1], 4.000001]}, "long_factor"),
        ({"short_factor": LONG}, "short_factor"),
        ({"attention_factor": 1.1000002}, "long_attention_factor"),
        ({"rope_theta": 10000.0}, "rope_theta"),
        ({"original_max_position_embeddings": 64}, "original_max_position_embeddings"),
    ],
)
def test_a_record_that_disagrees_with_rope_parameters_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InputFileError, match=rf"disagree in {field};"):
        scaling_from_config(carrying(record(), **change))


def test_a_record_without_longrope_parameters_is_refused() -> None:
    with pytest.raises(InputFileError, match="not longrope"):
        scaling_from_config({**BASE, RECORD_KEY: record().to_dict()})
    with pytest.raises(InputFileError, match="must be an object"):
        scaling_from_config({**BASE, RECORD_KEY: "x"})


def test_a_window_that_differs_from_the_record_is_refused() -> None:
    with pytest.raises(InputFileError, match="disagree in max_position_embeddings"):
        scaling_from_config({**carrying(record()), "max_position_embeddings": 256})


def test_unknown_model_types_are_read_by_the_common_rules() -> None:
    scaling = scaling_from_config({**CASES["rope_parameters"], "model_type": "somethingnew"})
    assert scaling == scaling_from_config(CASES["rope_parameters"])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "differing dicts": (
        {**BASE, "rope_theta": 5e4, "rope_parameters": ROPE, "rope_scaling": {**ROPE, "long_factor": SHORT}},
        "differ",
    ),
    "no long_factor": ({**BASE, "rope_parameters": without(ROPE, "long_factor")}, "long_factor"),
    "no short_factor": ({**BASE, "rope_parameters": without(ROPE, "short_factor")}, "short_factor is None"),
    "wrong length": ({**BASE, "rope_parameters": {**ROPE, "long_factor": [1.0]}}, "long_factor has 1 values"),
    "text as list": ({**BASE, "rope_parameters": {**ROPE, "long_factor": "1" * 8}}, "long_factor"),
    "zero": ({**BASE, "rope_parameters": {**ROPE, "long_factor": [*LONG[:-1], 0.0]}}, r"long_factor\[7\]"),
    "text inside": (
        {**BASE, "rope_parameters": {**ROPE, "long_factor": [*LONG[:-1], "4"]}},
        r"long_factor\[7\]",
    ),
    "factor text beside an attention factor": (
        {**BASE, "rope_parameters": {**ROPE, "factor": "4", "attention_factor": 1.1}},
        "factor is '4'",
    ),
    "attention 0": (
        {**BASE, "rope_parameters": {**ROPE, "attention_factor": 0.0}},
        "attention_factor is 0.0",
    ),
    "attention text": (
        {**BASE, "rope_parameters": {**ROPE, "attention_factor": "1"}},
        "attention_factor is '1'",
    ),
    "factor text": ({**BASE, "rope_parameters": {**ROPE, "factor": []}}, r"factor is \[\]"),
    "original 1": ({**BASE, "rope_parameters": {**ROPE, "original_max_position_embeddings": 1}}, "original"),
    "original text": (
        {**BASE, "rope_parameters": {**ROPE, "original_max_position_embeddings": "32"}},
        "is '32'",
    ),
    "window below original": (
        {**BASE, "max_position_embeddings": 16, "rope_parameters": ROPE},
        "max_position",
    ),
    "theta 0": ({**BASE, "rope_parameters": {**ROPE, "rope_theta": 0}}, "rope_theta is 0"),
    "theta huge": ({**BASE, "rope_parameters": {**ROPE, "rope_theta": 10**400}}, "rope_theta"),
    "parameters list": ({**BASE, "rope_parameters": [1]}, r"rope_parameters is \[1\]"),
    "type number": ({**BASE, "rope_parameters": {"rope_type": 3}}, "rope_type is 3"),
    "nested": ({**BASE, "rope_parameters": {"full_attention": ROPE}}, "llama has one RoPE"),
    "text_config": ({"model_type": "gemma3", "text_config": 3}, "text_config must be"),
    "partial": ({**BASE, "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "rotates whole heads"),
    "head_dim": ({**BASE, "head_dim": 16.5, "rope_parameters": ROPE}, "head_dim is 16.5"),
    "hidden": (
        {**without(BASE, "head_dim"), "hidden_size": True, "rope_parameters": ROPE},
        "hidden_size is True",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_malformed_configs_are_refused(name: str) -> None:
    config, message = BAD[name]
    with pytest.raises(LongRopeError, match=message):
        scaling_from_config(config)


def test_a_broken_record_is_a_scaling_error() -> None:
    with pytest.raises(ScalingError, match="unknown keys"):
        scaling_from_config({**carrying(record()), RECORD_KEY: {**record().to_dict(), "extra": 1}})


def test_longrope_on_sliding_layers_is_refused() -> None:
    nested = {"full_attention": ROPE, "sliding_attention": ROPE}
    with pytest.raises(UnsupportedModelError, match="sliding-window layers"):
        scaling_from_config({**GEMMA, "rope_parameters": nested})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.sampled_from(sorted({*BASE, *ROPE})), inner),
    max_leaves=8,
)


@given(
    key=st.sampled_from(sorted({*BASE, *ROPE, "rope_scaling", RECORD_KEY, "text_config", "partial_rotary_factor"})),
    value=JSON,
)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_value_of_any_key_raises_another_error(key: str, value: Any) -> None:
    for config in (
        {**BASE, "rope_parameters": ROPE, key: value},
        {**BASE, "rope_parameters": {**ROPE, key: value}},
    ):
        with contextlib.suppress(LongRopeError):
            scaling_from_config(config)
