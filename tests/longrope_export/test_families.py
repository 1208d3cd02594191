"""Each family's row against a tiny random model that transformers builds, and the GGUF architecture table."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from longrope_export.description import describe
from longrope_export.errors import UnsupportedModelError
from longrope_export.families import (
    FAMILIES,
    FULL,
    GGUF_ARCHITECTURES,
    SLIDING,
    family_for_config,
    family_for_gguf,
    gguf_architecture,
    head_dim,
    rotary_dim,
)
from longrope_export.rope.frequencies import inverse_frequencies

TINY = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 32, "num_hidden_layers": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    "qwen3": {"head_dim": 16},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    "granite": {},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": [SLIDING, FULL, SLIDING, FULL]},
}
ROTARY = {
    "llama": 16,
    "mistral": 16,
    "qwen2": 24,
    "qwen3": 16,
    "phi3": 18,
    "granite": 24,
    "gemma2": 16,
    "gemma3_text": 16,
}


def tiny_config(model_type: str) -> Any:
    return AutoConfig.for_model(model_type, **{**TINY, **MORE[model_type]})


def attribute(model: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), model)


@pytest.fixture(scope="module", params=sorted(MORE))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(request.param))
    folder = tmp_path_factory.mktemp("families") / request.param
    model.save_pretrained(folder)
    return request.param, model, folder


def test_every_family_is_covered_by_a_tiny_model() -> None:
    assert {family_for_config(name).name for name in MORE} == set(FAMILIES)


def test_rotary_module_and_its_length(tiny: tuple[str, Any, Path]) -> None:
    model_type, model, folder = tiny
    family = family_for_config(model_type)
    rotary = attribute(model, family.rotary_path)
    assert "RotaryEmbedding" in type(rotary).__name__
    description = describe(folder)
    frequencies = rotary.full_attention_inv_freq if family.nested_rope else rotary.inv_freq
    assert description.rotary_dim == ROTARY[model_type] == 2 * len(frequencies)
    ours = inverse_frequencies(description.rope_theta, description.rotary_dim)
    torch.testing.assert_close(frequencies.double(), torch.from_numpy(ours), rtol=1e-6, atol=0)


def test_description_equals_the_loaded_config(tiny: tuple[str, Any, Path]) -> None:
    model_type, model, folder = tiny
    description, config = describe(folder), AutoConfig.from_pretrained(folder)
    family = family_for_config(model_type)
    assert type(model).__name__ in family.architectures
    attention = model.model.layers[0].self_attn
    assert description.head_dim == attention.head_dim
    assert hasattr(attention, "q_norm") == family.qk_norm
    assert hasattr(config, "original_max_position_embeddings") == family.top_level_original
    assert (description.layers, description.heads, description.kv_heads) == (4, 2, 1)
    assert (description.hidden, description.vocab, description.window) == (48, 97, 64)
    rope = config.rope_parameters[FULL] if family.nested_rope else config.rope_parameters
    assert (description.rope_theta, description.rope_type) == (rope["rope_theta"], rope["rope_type"])
    if getattr(config, "layer_types", None):
        assert list(description.layer_types) == config.layer_types
    if SLIDING in description.layer_types:
        assert description.sliding_window == config.sliding_window
    counted = sum(parameter.numel() for parameter in model.state_dict().values())
    assert description.parameters == counted - (model.lm_head.weight.numel() if config.tie_word_embeddings else 0)


@pytest.mark.parametrize("model_type", sorted(MORE))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    family = family_for_config(model_type)
    config = AutoConfig.for_model(model_type)
    for key, value in family.defaults.items():
        if key == "rope_theta":
            rope = config.rope_parameters[FULL] if family.nested_rope else config.rope_parameters
            assert rope["rope_theta"] == value
        elif key == "sliding_window_pattern":
            assert config._sliding_window_pattern == value
        elif key == "sliding_window" and model_type.startswith("qwen"):
            assert type(config)(use_sliding_window=True).sliding_window == value
        elif value is None and key == "num_key_value_heads":
            assert config.num_key_value_heads == config.num_attention_heads
        else:
            assert getattr(config, key) == value, key
    assert head_dim(family, {**family.defaults}) == getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    layers = family.layer_types(family.defaults, config.num_hidden_layers)
    if getattr(config, "layer_types", None):
        assert list(layers) == config.layer_types


def test_the_multimodal_gemma3_has_its_rotary_module_elsewhere() -> None:
    family = FAMILIES["gemma3"]
    text = {**TINY, **MORE["gemma3_text"]}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = transformers.Gemma3ForConditionalGeneration(config)
    assert type(model).__name__ in family.architectures
    assert family.multimodal_rotary_path is not None
    assert "RotaryEmbedding" in type(attribute(model, family.multimodal_rotary_path)).__name__


def test_the_window_of_gemma3_layers_uses_the_local_theta() -> None:
    model = AutoModelForCausalLM.from_config(tiny_config("gemma3_text"))
    family = FAMILIES["gemma3"]
    assert family.local_theta is not None
    ours = inverse_frequencies(family.local_theta, 16)
    local = attribute(model, family.rotary_path).sliding_attention_inv_freq
    torch.testing.assert_close(local.double(), torch.from_numpy(ours), rtol=1e-6, atol=0)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'mamba' is not known .*gemma2, .*llama, .*qwen3"):
        family_for_config("mamba")
    with pytest.raises(UnsupportedModelError, match="is not known"):
        family_for_config(["llama"])
    with pytest.raises(UnsupportedModelError, match=r"'newarch' is not known .*llama, .*phi3"):
        gguf_architecture("newarch")


def test_partial_rotation_is_for_families_that_have_it() -> None:
    assert rotary_dim(FAMILIES["phi3"], 128, 0.75) == 96
    assert rotary_dim(FAMILIES["llama"], 128) == 128
    with pytest.raises(UnsupportedModelError, match="llama rotates whole heads"):
        rotary_dim(FAMILIES["llama"], 128, 0.5)
    for factor in (0.01, 1.5, 17 / 128):
        with pytest.raises(UnsupportedModelError, match="must be even and from 2 to 128"):
            rotary_dim(FAMILIES["phi3"], 128, factor)


def test_gguf_architectures_that_use_factors_are_exactly_the_verified_ones() -> None:
    used = {name for name, row in GGUF_ARCHITECTURES.items() if row.honours_factors}
    assert used == {
        "apertus", "deci", "granite", "granite_swa", "granitemoe", "llama", "llama-embed", "minicpm",
        "minicpm3", "mistral3", "phi3", "phimoe", "step35",
    }  # fmt: skip
    assert {name for name in used if not GGUF_ARCHITECTURES[name].needs_type} == {
        "minicpm3",
        "phi3",
        "phimoe",
    }
    assert {name for name in used if GGUF_ARCHITECTURES[name].whole_head} == {"deci", "llama", "llama-embed"}
    neox = {name for name in used if GGUF_ARCHITECTURES[name].pair_layout == "NEOX"}
    assert neox == {"apertus", "minicpm3", "phi3", "phimoe", "step35"}
    ignored = {name for name, row in GGUF_ARCHITECTURES.items() if row.factors == "ignored"}
    assert ignored == {"pangu-embedded", "refact"}
    assert GGUF_ARCHITECTURES["step35"].dimension_count_scale == 2


def test_the_gguf_package_knows_no_rotating_architecture_that_the_table_lacks() -> None:
    from gguf.constants import MODEL_ARCH_NAMES

    names = set(MODEL_ARCH_NAMES.values())
    # llama.cpp knows the name and builds no such model.
    assert names - set(GGUF_ARCHITECTURES) <= {"gptj"}


def test_every_family_has_gguf_architectures_with_its_pair_layout() -> None:
    for family in FAMILIES.values():
        for name in family.gguf_architectures:
            assert GGUF_ARCHITECTURES[name].pair_layout == family.pair_layout
    row = family_for_gguf("llama")
    assert row is not None
    assert row.name == "llama"
    assert family_for_gguf("falcon") is None


def test_the_documented_tables_are_the_tables() -> None:
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    lines = [line.split(" #")[0] for line in text.splitlines()]
    for family in FAMILIES.values():
        layout, archs = family.pair_layout, ", ".join(f"`{name}`" for name in family.gguf_architectures)
        types = ", ".join(f"`{name}`" for name in family.model_types)
        assert sum(line.startswith(f"| {family.name} | {types} | {archs} | {layout} |") for line in lines) == 1
    for row in GGUF_ARCHITECTURES.values():
        expected = f"| `{row.name}` | {row.pair_layout} | {'yes' if row.needs_type else 'no'} | {row.static} |"
        assert sum(line == expected for line in lines) == int(row.honours_factors), expected
