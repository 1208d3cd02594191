"""`load` of models whose config has linear, YaRN or Llama-3 scaling and no record: exact, or transformers' own bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from switch_checks import alone, build, difference, tokens
from torch import Tensor

from longrope_export import load
from longrope_export.errors import ScalingError, UnsupportedModelError
from longrope_export.evaluation.passes import rotation_of
from longrope_export.rotary import FixedRotary, LayerTypeRotary, rotary_module

THETA = 10000.0
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0},
    "llama3": {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
CASES = [*(("llama", name) for name in ROPES), ("qwen2", "yarn"), ("gemma3_text", "linear"), ("gemma3_text", "yarn")]


def stock(family: str, rope_type: str, **more: Any) -> Any:
    return build(family, {"rope_type": rope_type, "rope_theta": THETA, **ROPES.get(rope_type, {}), **more})


@torch.no_grad()
def shifted(model: Any, row: Tensor) -> float:
    """How much the logits change when the row stands two million positions later: nothing, were the angles exact."""
    far = torch.arange(2_000_000, 2_000_000 + row.shape[1])[None]
    return difference(model(input_ids=row, position_ids=far, use_cache=False).logits[0], alone(model, row))


@pytest.mark.parametrize(("family", "rope_type"), CASES)
def test_own_types_are_exact_and_in_float32_transformers_bits(family: str, rope_type: str, tmp_path: Path) -> None:
    plain, expected, row = build(family), stock(family, rope_type), tokens(60)
    expected.save_pretrained(tmp_path)
    own = alone(expected, row)
    assert difference(own, alone(plain, row)) > 0.1, "this scaling changes nothing: the test is empty"
    assert shifted(expected, row) > 0.02
    exact, same = load(tmp_path), load(tmp_path, angles="float32")
    assert difference(alone(exact, row), own) <= 1e-4
    assert shifted(exact, row) <= 1e-3
    assert torch.equal(alone(same, row), own)
    assert type(rotary_module(exact)) is (LayerTypeRotary if family == "gemma3_text" else FixedRotary)
    assert rotation_of(exact)(1) == rotation_of(exact)(10_000)


def test_the_config_stays_as_it_is(tmp_path: Path) -> None:
    stock("llama", "yarn").save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert first["rope_parameters"] == second["rope_parameters"]
    assert "longrope_export" not in second


def test_a_model_in_memory_and_every_switch() -> None:
    row = tokens(60)
    own = alone(stock("llama", "yarn"), row)
    for options in ({"switch": "short"}, {"switch": "long"}, {"switch": "context", "context": 10**6}, {}):
        model = stock("llama", "yarn")
        assert load(model, **options) is model
        assert difference(alone(model, row), own) <= 1e-4
        assert not model.model._forward_pre_hooks
    assert torch.equal(alone(load(model, angles="float32"), row), own)
    cast = load(stock("llama", "yarn").to(torch.bfloat16)).float()
    assert difference(alone(cast, row), alone(load(stock("llama", "yarn").to(torch.bfloat16).float()), row)) == 0.0


def test_generation_with_a_cache_is_that_of_transformers() -> None:
    options = {"max_new_tokens": 20, "do_sample": False}
    expected = stock("qwen2", "yarn").generate(tokens(25), use_cache=False, **options)
    assert torch.equal(load(stock("qwen2", "yarn")).generate(tokens(25), **options), expected)


@pytest.mark.parametrize("rope_type", ["default", "dynamic"])
def test_other_types_keep_their_module(rope_type: str) -> None:
    model = stock("llama", rope_type, **({"factor": 2.0} if rope_type == "dynamic" else {}))
    before = rotary_module(model)
    assert rotary_module(load(model)) is before
    with pytest.raises(ScalingError, match="carries none"):
        load(model, switch="long")


def test_what_is_not_known_is_refused_by_name() -> None:
    model = stock("llama", "yarn")
    model.config.rope_parameters["rope_type"] = "spiral"
    with pytest.raises(UnsupportedModelError, match="spiral"):
        load(model)
    model = stock("llama", "linear")
    model.config.model_type = "olmo2"
    with pytest.raises(UnsupportedModelError, match="olmo2"):
        load(model)
