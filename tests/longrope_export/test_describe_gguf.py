"""`longrope describe` of GGUF files: existing scaling as llama.cpp applies it, refusals by name, large vocabularies."""

from __future__ import annotations

import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from describe_inputs import KEYS, YARN, File, Folder

from longrope_export.description import describe
from longrope_export.errors import InputFileError, LongRopeError, UnsupportedModelError


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
    with pytest.raises(InputFileError, match=r"one of 3 shards.*NAME-00001-of-00003"):
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


@pytest.mark.parametrize("kind", [[1, 2], ["longrope"], 3])
def test_a_scaling_type_that_is_no_string_is_refused(kind: Any, file: File) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rope\.scaling\.type is"):
        describe(file({**KEYS, "rope.scaling.type": kind}))


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
