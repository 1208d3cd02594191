"""`longrope describe`: folders and GGUF files, existing scaling, and hostile input."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longrope_export.cli.main import main
from longrope_export.description import describe
from longrope_export.errors import InputFileError, LongRopeError, UnsupportedModelError
from longrope_export.honours import RUNTIMES

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
KEYS: dict[str, Any] = {
    "context_length": 8192,
    "embedding_length": 32,
    "block_count": 4,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 16,
    "rope.freq_base": 500000.0,
    "vocab_size": 97,
}
_KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
Folder = Callable[..., Path]
File = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    def write(config: dict[str, Any] | str | None = None, **changes: Any) -> Path:
        values = {**CONFIG, **changes}
        text = config if isinstance(config, str) else json.dumps(config or values)
        (tmp_path / "config.json").write_text(text)
        return tmp_path

    return write


@pytest.fixture
def file(tmp_path: Path) -> File:
    def write(
        keys: dict[str, Any] = KEYS,
        tensors: dict[str, np.ndarray] | None = None,
        architecture: str = "llama",
        **more: Any,
    ) -> Path:
        path = tmp_path / "model.gguf"
        writer = GGUFWriter(path, architecture)
        for name, value in keys.items():
            if isinstance(value, list):
                writer.add_array(f"{architecture}.{name}", value)
            else:
                writer.add_key_value(f"{architecture}.{name}", value, _KINDS[type(value)])
        for name, value in more.items():
            writer.add_key_value(name.replace("__", "."), value, _KINDS[type(value)])
        for name, values in {"token_embd.weight": np.zeros((97, 32), np.float32), **(tensors or {})}.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def test_smollm2(smollm2: Path) -> None:
    model = describe(smollm2)
    assert (model.kind, model.architecture, model.head_dim, model.rotary_dim) == ("gguf", "llama", 64, 64)
    assert (model.window, model.original_window, model.rope_theta) == (8192, 8192, 100000.0)
    assert (model.layers, model.heads, model.kv_heads, model.hidden, model.vocab) == (30, 9, 3, 576, 49152)
    assert model.parameters == 134_515_008
    assert set(model.tensor_bytes) == {"F32", "Q4_1", "Q8_0"}
    assert (model.scaling, model.existing_factors, model.existing_attention_factor) == (None, None, 1.0)
    assert model.family is not None
    assert model.family.name == "llama"
    assert model.warnings == ()


def test_a_saved_folder(tiny_llama: Path) -> None:
    model = describe(tiny_llama)
    assert (model.kind, model.architecture, model.head_dim, model.rotary_dim) == ("hf", "llama", 32, 32)
    assert (model.window, model.rope_theta, model.rope_type) == (32, 10000.0, "default")
    assert model.parameters > 50_000
    assert model.tensor_bytes == {"F32": 4 * model.parameters}
    assert describe(tiny_llama / "config.json") == model


def test_a_sharded_folder_counts_every_shard(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert describe(sharded).parameters == describe(tiny_llama).parameters
    missing = sorted(sharded.glob("*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(InputFileError, match=f"{missing.name} is missing"):
        describe(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a\\b", "..", "x\0y"])
def test_an_index_cannot_name_files_outside_the_folder(name: str, folder: Folder) -> None:
    path = folder()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputFileError, match="not a file name in the folder"):
        describe(path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_malformed_index_is_refused(index: str, folder: Folder) -> None:
    path = folder()
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(InputFileError, match=r"index\.json"):
        describe(path)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
    "long_factor": [1.0, 1, 1, 2, 3, 4, 4, 4],
    "short_factor": [1.0] * 7 + [1.5],
}


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "linear", "factor": 4.0}, {**LLAMA3, "original_max_position_embeddings": 1024}, YARN, LONGROPE],
    ids=lambda rope: rope["rope_type"],
)
def test_existing_scaling_of_a_folder_is_what_transformers_computes(rope: dict[str, Any], folder: Folder) -> None:
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    path = folder(rope_parameters={**rope, "rope_theta": 10000.0})
    model, module = describe(path), LlamaRotaryEmbedding(AutoConfig.from_pretrained(path))
    assert model.rope_type == rope["rope_type"]
    assert model.rope_parameters["factor"] == rope["factor"]
    assert model.existing_factors is not None
    unscaled = 10000.0 ** (-np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(unscaled / model.existing_factors, module.inv_freq.numpy(), rtol=2e-6)
    assert model.existing_attention_factor == pytest.approx(module.attention_scaling, rel=1e-6)
    assert (model.scaling is not None) == (rope is LONGROPE)
    assert model.original_window == (2048 if rope is LONGROPE else 8192)


def test_warnings_of_a_folder_name_what_runtimes_disagree_about(folder: Folder) -> None:
    rope = {**LONGROPE, "rope_theta": 1e4, "factor": 8.0, "attention_factor": 1.5, "long_mscale": 1.0}
    text = " | ".join(describe(folder(rope_parameters=rope)).warnings)
    expected = (
        "factor is 8, the windows' ratio 4",
        "attention_factor 1.5 is not",
        "short_mscale and long_mscale",
        "only rope_parameters",
        "no .safetensors",
    )
    for part in expected:
        assert part in text
    other = {**LONGROPE, "rope_theta": 1e4}
    linear = {"type": "linear", "factor": 2.0}
    model = describe(folder(rope_scaling=linear, rope_parameters=other))
    (both,) = (warning for warning in model.warnings if "differ" in warning)
    assert "rope_scaling" in both
    overridden = describe(folder(original_max_position_embeddings=4096, rope_parameters=other))
    assert overridden.original_window == 4096
    assert "overrides" in " ".join(overridden.warnings)
    without = {key: value for key, value in other.items() if key != "original_max_position_embeddings"}
    assert "is missing" in " ".join(describe(folder(rope_parameters=without)).warnings)


def test_sliding_windows_are_shown(folder: Folder) -> None:
    model = describe(folder(model_type="mistral", sliding_window=4096))
    assert model.layer_types == ("sliding_attention",) * 2
    assert model.sliding_window == 4096
    assert "see 4,096 tokens only" in " ".join(model.warnings)
    assert describe(folder(model_type="mistral", sliding_window=None)).sliding_window is None
    qwen = describe(folder(model_type="qwen2", sliding_window=4096, use_sliding_window=False))
    assert (qwen.layer_types, qwen.sliding_window) == (("full_attention",) * 2, None)


def test_gemma3_shows_the_rope_of_its_full_attention_layers(folder: Folder) -> None:
    text = {**CONFIG, "rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "head_dim": 16}
    model = describe(folder({"model_type": "gemma3", "text_config": {**text, "model_type": "gemma3_text"}}))
    assert (model.architecture, model.rope_theta, model.rotary_dim) == ("gemma3", 1e6, 16)
    assert model.family is not None
    assert model.family.nested_rope
    flat = describe(folder(model_type="gemma3_text", rope_parameters={**LONGROPE, "rope_theta": 1e4}))
    assert flat.rope_type == "default"
    assert "not nested" in " ".join(flat.warnings)


def test_linear_and_static_scaling_of_a_gguf(file: File) -> None:
    model = describe(file({**KEYS, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}))
    assert (model.rope_type, model.existing_factors) == ("linear", (4.0,) * 8)
    untyped = describe(file({**KEYS, "rope.scale_linear": 2.0, "rope.scaling.attn_factor": 1.5}))
    assert (untyped.existing_factors, untyped.existing_attention_factor) == ((2.0,) * 8, 1.5)
    static = np.arange(1, 9, dtype=np.float32)
    model = describe(file(tensors={"rope_freqs.weight": static}))
    assert (model.rope_type, model.existing_factors) == ("rope_freqs", tuple(static.tolist()))
    assert model.scaling is None
    assert model.parameters == 97 * 32, "rope tensors are no weights"
    with pytest.raises(InputFileError, match=r"rope_freqs\.weight has 7 values, 8 are needed"):
        describe(file(tensors={"rope_freqs.weight": static[:7]}))


def test_yarn_of_a_gguf_equals_yarn_of_a_folder(file: File, folder: Folder) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 2048}
    factored = describe(file({**KEYS, **yarn, "rope.scaling.attn_factor": 1.5}))
    ours = describe(file({**KEYS, **yarn}))
    reference = describe(folder(rope_parameters={**YARN, "rope_theta": 500000.0}))
    assert ours.existing_factors == reference.existing_factors
    assert ours.existing_attention_factor == pytest.approx(reference.existing_attention_factor, rel=1e-7)
    assert factored.existing_attention_factor == pytest.approx(1.5 * ours.existing_attention_factor, rel=1e-7)


def test_longrope_of_a_gguf(file: File) -> None:
    long = np.linspace(1, 4, 8).astype(np.float32)
    keys = {**KEYS, "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 2048}
    tensors = {"rope_factors_long.weight": long, "rope_factors_short.weight": np.full(8, 1.25, np.float32)}
    model = describe(file(keys, tensors))
    assert model.scaling is not None
    assert model.scaling.long_factor == tuple(long.tolist())
    assert (model.existing_factors, model.original_window, model.window) == ((1.25,) * 8, 2048, 8192)
    assert model.rope_parameters == {
        "rope_type": "longrope",
        "rope_theta": 500000.0,
        "original_max_position_embeddings": 2048,
        "attention_factor": 1.0,
    }
    assert model.warnings == ()


def test_warnings_of_a_gguf_name_what_llama_cpp_does(file: File) -> None:
    ones = np.ones(8, np.float32)
    assert "runs plain RoPE" in describe(file({**KEYS, "rope.scaling.type": "longrope"})).warnings[0]
    only = describe(file(KEYS, {"rope_factors_long.weight": ones, "rope_freqs.weight": ones}))
    text = " | ".join(only.warnings)
    expected = ("without rope.scaling.type", "stands beside", "only rope_factors_long", "original_context_length is")
    for part in expected:
        assert part in text
    qwen = describe(file(KEYS, {"rope_factors_long.weight": ones}, "qwen2"))
    assert "does not apply factor tensors for architecture qwen2 (refused)" in qwen.warnings[0]
    phi = describe(file(KEYS, {"rope_factors_long.weight": ones}, "phi3"))
    assert "without rope.scaling.type" not in " ".join(phi.warnings)
    typed = {**KEYS, "rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}
    twice = describe(file(typed, {"rope_factors_short.weight": ones * 2}))
    assert "interpolates on top" in twice.warnings[0]
    assert twice.existing_factors == (8.0,) * 8
    odd = {**KEYS, "rope.scaling.type": "longrope", "rope.scaling.original_context_length": 1000}
    both = {"rope_factors_long.weight": ones, "rope_factors_short.weight": ones}
    assert "no multiple of 256" in describe(file(odd, both)).warnings[0]
    partial = describe(file({**KEYS, "rope.dimension_count": 8}))
    assert "not the head's size" in partial.warnings[0]


def test_numbers_per_layer_and_window_patterns_of_a_gguf(file: File) -> None:
    keys = {**KEYS, "attention.head_count_kv": [1, 2, 1, 2], "attention.key_length": 16}
    assert describe(file(keys)).kv_heads == 2
    gemma = {**KEYS, "attention.sliding_window": 512}
    model = describe(file(gemma, architecture="gemma2"))
    assert model.layer_types == ("sliding_attention", "full_attention") * 2
    assert model.sliding_window == 512
    pattern = {**gemma, "attention.sliding_window_pattern": [True, True, False, True]}
    assert describe(file(pattern, architecture="gemma3")).layer_types.index("full_attention") == 2
    assert describe(file(gemma, architecture="phi3")).sliding_window is None, "llama.cpp applies none there"


def test_honours_depends_on_the_kind_and_the_architecture(file: File, folder: Folder) -> None:
    for architecture, expected in (("llama", "yes"), ("qwen2", "no:"), ("pangu-embedded", "loads the factors and")):
        model = describe(file(architecture=architecture))
        assert tuple(model.honours) == RUNTIMES
        assert model.honours["llama.cpp"].startswith(expected)
        assert model.honours["transformers"].startswith("no:")
    hf = describe(folder())
    assert tuple(hf.honours) == RUNTIMES
    assert hf.honours["transformers"].startswith("yes")
    assert "drops its cache" in describe(folder(model_type="phi3", pad_token_id=0)).honours["transformers"]
    assert "ignores attention_factor" in hf.honours["vLLM"]


def test_another_projects_keys_and_tensors_do_no_harm(file: File) -> None:
    plain = describe(file())
    junk = {"x.rope.scaling.type": "longrope", "llama.rope.scaling.type.extra": 3, "x.list": ["a", "ß"], "x.big": 0.5}
    tensors = {"rope_notes": np.ones(3, np.float32), "x.rope_factors_long.weight": np.ones(5, np.float16)}
    model = describe(file({**KEYS, **junk}, tensors, other__longrope="yes", quantize__imatrix__file="a.dat"))
    assert replace(model, parameters=0, tensor_bytes={}) == replace(plain, parameters=0, tensor_bytes={})


@pytest.mark.parametrize("architecture", ["gpt2", "bert", "mamba"])
def test_a_gguf_without_rope_is_refused_by_name(architecture: str, file: File) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'{architecture}' has no rotary"):
        describe(file({"context_length": 512, "block_count": 2}, architecture=architecture))


def test_other_ggufs_are_refused_by_name(file: File) -> None:
    plain = {key: value for key, value in KEYS.items() if not key.startswith("rope.")}
    with pytest.raises(UnsupportedModelError, match=r"neither llama\.rope\.freq_base nor"):
        describe(file(plain))
    with pytest.raises(UnsupportedModelError, match="'newarch' is not known here"):
        describe(file(architecture="newarch"))
    with pytest.raises(UnsupportedModelError, match=r"one of 3 shards.*--merge"):
        describe(file(split__count=3))
    with pytest.raises(UnsupportedModelError, match=r"multi-axis RoPE \(MROPE\)"):
        describe(file(architecture="qwen2vl"))
    with pytest.raises(UnsupportedModelError, match=r"rope\.scaling\.type is 'longrop'"):
        describe(file({**KEYS, "rope.scaling.type": "longrop"}))


def test_a_gguf_without_architecture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with pytest.raises(InputFileError, match=r"no general\.architecture"):
        describe(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context_length": 0}, "context_length is '0'"),
        ({"context_length": "8192"}, "context_length is '8192'"),
        ({"block_count": 4_000_000_000}, "block_count"),
        ({"rope.freq_base": float("inf")}, "freq_base must be"),
        ({"rope.freq_base": 10000}, "freq_base must be"),
        ({"rope.dimension_count": 15}, "must be even"),
        ({"rope.dimension_count": 100_000}, "must be even"),
        ({"attention.head_count": "x"}, "head_count is 'x'"),
        ({"attention.head_count": ["a", "b"]}, "one number per layer"),
        ({"attention.head_count": []}, "head_count"),
    ],
)
def test_malformed_keys_of_a_gguf_are_refused(change: dict[str, Any], message: str, file: File) -> None:
    if change.get("attention.head_count") == []:
        change = {"attention.head_count": 0}
    with pytest.raises(LongRopeError, match=message):
        describe(file({**KEYS, **change}))


HOSTILE = {
    "not JSON": ("{", "not valid JSON"),
    "a list": ("[]", "must hold a JSON object"),
    "duplicate": ('{"model_type": "llama", "model_type": "llama"}', "duplicate key"),
    "NaN": ('{"rope_theta": NaN}', "holds NaN"),
    "infinity": ('{"rope_theta": -Infinity}', "holds -Infinity"),
    "overflow": ('{"rope_theta": 1e999}', "holds 1e999"),
    "surrogate": ('{"rope_theta": "\\ud800"}', "surrogates not allowed"),
    "deep": ("[" * 200_000, "not valid JSON"),
    "digits": ('{"vocab_size": ' + "9" * 5000 + "}", "not valid JSON"),
    "no type": ("{}", "'None' is not known"),
    "type list": ('{"model_type": ["llama"]}', "is not known"),
    "other type": ('{"model_type": "mamba"}', "'mamba' is not known here; known are: gemma2"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_configs_get_one_line(name: str, folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    text, message = HOSTILE[name]
    path = folder(text)
    with pytest.raises(SystemExit) as caught:
        main(["describe", str(path)])
    output = capsys.readouterr()
    assert caught.value.code == 1
    assert output.out == ""
    assert output.err.startswith("longrope: ")
    assert output.err.count("\n") == 1
    assert message in output.err
    assert "config.json" in output.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": 2.0}, r"num_attention_heads is 2\.0"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": 10**300}, "hidden_size is a number of over 30 digits"),
        ({"num_hidden_layers": 2**31 - 1}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"num_key_value_heads": []}, r"num_key_value_heads is \[\]"),
        ({"vocab_size": None}, "vocab_size is None"),
        ({"head_dim": 7}, "even"),
        ({"head_dim": 10**9}, "would be rotated"),
        ({"rope_parameters": {"rope_theta": 1e999}}, "Infinity"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor = 4"),
        ({"rope_parameters": {"rope_type": "other"}}, "'other' cannot be turned into factors"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types must be 2 times"),
        ({"model_type": "qwen2", "layer_types": [[], {}]}, "layer_types must be 2 times"),
        ({"model_type": "mistral", "sliding_window": "4"}, "sliding_window is '4'"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ],
)
def test_wrong_values_in_a_config_are_named(change: dict[str, Any], message: str, folder: Folder) -> None:
    with pytest.raises(LongRopeError, match=message) as caught:
        describe(folder(**change))
    assert "config.json" in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
MORE_KEYS = [
    "head_dim",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "layer_types",
    "text_config",
    "longrope_export",
]


@given(
    model_type=st.sampled_from(["llama", "mistral", "qwen2", "phi3", "gemma3_text"]),
    key=st.sampled_from([*CONFIG, *MORE_KEYS]),
    value=VALUES,
)
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_value_of_any_config_key_raises_another_error(model_type: str, key: str, value: Any, folder: Folder) -> None:
    try:
        model = describe(folder(**{"model_type": model_type, key: value}))
    except LongRopeError:
        return
    json.dumps(model.to_dict(), allow_nan=False)


@given(flips=st.lists(st.tuples(st.integers(0, 1100), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_damage_of_a_gguf_raises_only_our_errors(flips: list[tuple[int, int]], file: File) -> None:
    keys = {**KEYS, "rope.scaling.type": "longrope", "attention.sliding_window": 3, "attention.head_count": [2, 2]}
    factors = {"rope_factors_long.weight": np.ones(8, np.float32), "rope_freqs.weight": np.ones(8, np.float32)}
    path = file(keys, factors)
    raw = bytearray(path.read_bytes())
    for position, value in flips:
        raw[position % len(raw)] = value
    path.write_bytes(raw)
    try:
        model = describe(path)
    except LongRopeError:
        return
    json.dumps(model.to_dict(), allow_nan=False, ensure_ascii=False).encode()


@pytest.mark.parametrize("kind", [[1, 2], ["longrope"], 3])
def test_a_scaling_type_that_is_no_string_is_refused(kind: Any, file: File) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope\.scaling\.type is"):
        describe(file({**KEYS, "rope.scaling.type": kind}))


def test_paths_that_are_no_models_are_refused(tmp_path: Path, smollm2: Path) -> None:
    with pytest.raises(InputFileError, match=r"does not exist.*hf download"):
        describe(tmp_path / "absent")
    with pytest.raises(InputFileError, match=r"has no config\.json; name a model folder"):
        describe(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputFileError, match="neither a GGUF file nor a model folder"):
        describe(tmp_path / "notes.txt")
    shutil.copyfile(smollm2, tmp_path / "a.gguf")
    with pytest.raises(InputFileError, match=r"name its GGUF file, for example .*a\.gguf"):
        describe(tmp_path)
    (tmp_path / "a.gguf").rename(tmp_path / "blob")
    assert describe(tmp_path / "blob").architecture == "llama", "told by its magic, not its name"


def test_pickled_weights_are_mentioned(folder: Folder) -> None:
    path = folder()
    (path / "pytorch_model.bin").write_bytes(b"x")
    assert "pickle" in " ".join(describe(path).warnings)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_command_prints_json_and_a_table(smollm2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = json.loads(run("describe", str(smollm2), "--json", capsys=capsys))
    assert values == json.loads(json.dumps(describe(smollm2).to_dict()))
    assert (values["family"], values["window"], values["layer_types"][0]) == ("llama", 8192, "full_attention")
    table = run("describe", str(smollm2), capsys=capsys)
    for expected in ("134,515,008 parameters", "8,192 tokens", "theta 100,000", "llama.cpp", "mlx-lm"):
        assert expected in table


def test_the_table_shows_scaling_and_warnings(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(rope_parameters={**LONGROPE, "rope_theta": 1e4})
    table = run("describe", str(path), capsys=capsys)
    for expected in ("longrope, 2,048 → 8,192 tokens", "long factors", "greatest 4", "Warnings"):
        assert expected in table
    assert "yarn: factor 4" in run("describe", str(folder(rope_parameters=YARN)), capsys=capsys)


def test_terminal_escapes_in_a_file_are_made_visible(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder(rope_scaling={"type": "default", "\x1b[31m[bold]red": 1})
    table = run("describe", str(path), capsys=capsys)
    assert "differ in \\x1b[31m[bold]red" in " ".join(table.split())
    assert "\x1b" not in table


def test_describe_and_read_import_neither_torch_nor_transformers(smollm2: Path, tiny_llama: Path) -> None:
    code = (
        "import sys\nfrom longrope_export.cli.main import main\n"
        "for arguments in (['describe', sys.argv[1]], ['describe', sys.argv[2]], ['read', sys.argv[1]]):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "sys.exit(' '.join(name for name in ('torch', 'transformers', 'safetensors') if name in "
        "sys.modules) or 0)"
    )
    arguments = [sys.executable, "-c", code, str(smollm2), str(tiny_llama)]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_large_vocabulary_is_described_within_a_second(tmp_path: Path) -> None:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    def strings(key: str, form: str) -> bytes:
        values = b"".join(text(form.format(i)) for i in range(150_000))
        return text(key) + struct.pack("<IIQ", 9, 8, 150_000) + values

    def number(key: str, value: float) -> bytes:
        packed = struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)
        return text(f"llama.{key}") + packed

    numbers = [number(key, value) for key, value in KEYS.items() if key != "vocab_size"]
    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        *numbers,
        strings("tokenizer.ggml.tokens", "token{}"),
        strings("tokenizer.ggml.merges", "tok en{}"),
        text("tokenizer.ggml.token_type") + struct.pack("<IIQ", 9, 5, 150_000) + bytes(600_000),
    ]
    path = tmp_path / "large.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + b"".join(entries))
    start = time.process_time()
    model = describe(path)
    assert time.process_time() - start < 1.0
    assert model.vocab == 150_000
