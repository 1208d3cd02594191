"""`longrope describe` on wrong and hostile input: one clear error, never another one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from describe_inputs import CONFIG, KEYS, File, Folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longrope_export.cli.main import main
from longrope_export.description import describe
from longrope_export.errors import InputFileError, LongRopeError

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
