"""`longrope import`: factors from CSV files, configs and GGUF files are what their own code applies."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.cli.main import cli
from longrope_export.converters.imports.config_scaling import scaling_from_any_config
from longrope_export.converters.imports.csv_factors import MAX_BYTES, read_factor_csv
from longrope_export.converters.imports.run import import_csv, import_model
from longrope_export.errors import InputFileError, ScalingError, UnsupportedModelError
from longrope_export.rope.frequencies import inverse_frequencies
from longrope_export.scaling import to_float32

Build = Callable[..., Path]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8,
    "max_position_embeddings": 4096, "rope_theta": 10000.0,
}  # fmt: skip
RISING = [1.0, 1.01, 1.2, 1.69, 2.5, 8.0, 29.16, 32.0]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def config(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", **SIZES, **changes}


def read(values: dict[str, Any], **lengths: int | None) -> RopeScaling:
    return scaling_from_any_config(values, **{"original": None, "window": None, **lengths})


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"{value:.18e}" for value in RISING) + "\n",  # numpy.savetxt, as result_final.csv
        ",".join(map(str, RISING)),
        "\n".join([",".join(map(str, RISING))] * 32),
        "\n".join([" ".join(map(str, RISING))] * 3),
        "\ufeff# factors\r\n" + "\r\n".join(f"{value}," for value in RISING),
    ],
)
def test_every_form_of_the_table_is_one_set(tmp_path: Path, text: str) -> None:
    assert read_factor_csv(write(tmp_path / "f.csv", text), 8) == tuple(RISING)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("", InputFileError, "holds no factors"),
        ("1\n2\n", InputFileError, "has 2 factors, the model needs 8"),
        ("\n".join(["1"] * 10), InputFileError, "has 10 factors"),
        ("1,1,1,1,1,1,1,1\n1,1\n", InputFileError, "has 2 factors in line 2"),
        ("1,1,1,1,1,1,1,1\n1,1,1,2,1,1,1,1\n", ScalingError, r"layer 1 than for layer 0 \(pair 3: 2, 1\); no runtime"),
        ("1\nsearch_twice\n", InputFileError, "line 2: 'search_twice' is not a number"),
        (b"\xff\xfe\x00", InputFileError, "not a text file"),
        ("1," * 5000, InputFileError, "more than a model has pairs"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, text: str | bytes, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_factor_csv(write(tmp_path / "f.csv", text), 8)


def test_a_huge_or_missing_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "f.csv").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(InputFileError, match="no list of factors"):
        read_factor_csv(tmp_path / "f.csv", 8)
    with pytest.raises(InputFileError, match="cannot be read"):
        read_factor_csv(tmp_path / "nothing.csv", 8)


def test_a_csv_takes_base_and_window_from_the_model(tmp_path: Path, gguf_file: Build) -> None:
    long = write(tmp_path / "long.csv", "\n".join(map(str, RISING)))
    short = write(tmp_path / "short.csv", "\n".join(["1.5"] * 8))
    keys = {"llama.embedding_length": 64, "llama.attention.head_count": 4, "llama.block_count": 1,
            "llama.rope.freq_base": 5e5}  # fmt: skip
    model = gguf_file(keys=keys)
    found = import_csv(long, model=model, window=4096)
    assert found.long_factor == tuple(map(to_float32, RISING))
    assert found.short_factor == (1.0,) * 8
    assert (found.rope_theta, found.original_max_position_embeddings, found.max_position_embeddings) == (5e5, 512, 4096)
    # microsoft/LongRoPE, rope/longrope.py: magnitude_scaling_policy "su"
    assert found.long_attention_factor == to_float32(math.sqrt(1 + math.log(8) / math.log(512)))
    assert found.short_attention_factor == found.long_attention_factor
    other = import_csv(long, model=model, window=4096, original=256, short=short, attention_factor=1.25, start_tokens=4)
    assert other.short_factor == (1.5,) * 8
    assert (other.original_max_position_embeddings, other.long_attention_factor) == (256, 1.25)
    assert (other.long_start_tokens, other.short_start_tokens) == (4, 0)
    with pytest.raises(ScalingError, match="fewer than the model's window of 512"):
        import_csv(long, model=model, window=256)


TYPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.3},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.8},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 1024},
]  # fmt: skip


@pytest.mark.parametrize("parameters", TYPES, ids=lambda entry: str(entry.get("rope_type", entry.get("type"))))
def test_static_types_become_the_factors_that_transformers_applies(parameters: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = LlamaConfig(
        **SIZES, rope_parameters={"rope_theta": 10000.0, "rope_type": parameters.get("type"), **parameters}
    )
    frequencies, attention = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, "cpu")
    found = read(config(rope_scaling=parameters))
    assert found.is_static
    ours = inverse_frequencies(10000.0, 16) / np.array(found.long_factor)
    assert ours == pytest.approx(frequencies.numpy(), rel=1e-6)
    assert found.long_attention_factor == pytest.approx(attention, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, (4096, 16384)),
        ({"rope_scaling": TYPES[1]}, (4096, 16384)),
        ({"rope_scaling": TYPES[1], "max_position_embeddings": 12000}, (4096, 12000)),
        ({"rope_scaling": TYPES[5]}, (1024, 4096)),
    ],
)
def test_windows_of_static_types(changes: dict[str, Any], windows: tuple[int, int]) -> None:
    found = read(config(**changes))
    assert (found.original_max_position_embeddings, found.max_position_embeddings) == windows
    found = read(config(**changes), window=20000)
    assert (found.original_max_position_embeddings, found.max_position_embeddings) == (windows[0], 20000)
    found = read(config(**changes), original=2048)
    assert found.original_max_position_embeddings == 2048


def test_dynamic_ntk_is_the_set_of_one_length() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "dynamic", "factor": 2.0}
    theirs = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **parameters})
    frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](theirs, "cpu", seq_len=16384)
    found = read(config(rope_scaling=parameters), window=16384)
    ours = inverse_frequencies(10000.0, 16) / np.array(found.long_factor)
    assert ours == pytest.approx(frequencies.numpy(), rel=1e-6)
    assert found.short_factor == (1.0,) * 8
    assert (found.original_max_position_embeddings, found.max_position_embeddings) == (4096, 16384)


LISTS = {"long_factor": RISING, "short_factor": [1.0] * 7 + [1.5]}


@pytest.mark.parametrize(
    ("values", "attention", "windows"),
    [
        # Phi-3-mini-128k as published: su, L at the top level, no attention factor
        ({"model_type": "phi3", "original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
          "rope_scaling": {"type": "su", **LISTS}}, (math.sqrt(1 + 5 * math.log(2) / math.log(4096)),) * 2, (4096, 131072)),
        # Phi-3.5-MoE and Phi-3-small: an attention factor for each regime
        ({"model_type": "phimoe", "original_max_position_embeddings": 4096, "max_position_embeddings": 131072,
          "rope_scaling": {"type": "longrope", **LISTS, "long_mscale": 1.243163121016122, "short_mscale": 1.1}},
         (1.243163121016122, 1.1), (4096, 131072)),
        ({"model_type": "phi3small", "rope_theta": None, "rope_embedding_base": 1000000, "max_position_embeddings": 131072,
          "rope_scaling": {"type": "su", **LISTS, "original_max_position_embeddings": 8192, "long_mscale": 1.19,
                           "short_mscale": 1.0}}, (1.19, 1.0), (8192, 131072)),
        # MiniCPM: L inside, as long as the window: the formula gives 1
        ({"model_type": "minicpm", "rope_scaling": {"rope_type": "longrope", **LISTS,
          "original_max_position_embeddings": 4096}}, (1.0, 1.0), (4096, 4096)),
        # MiniCPM 3 rotates a part of each head, of a size of its own
        ({"model_type": "minicpm3", "num_attention_heads": 2, "qk_rope_head_dim": 16, "max_position_embeddings": 32768,
          "rope_scaling": {"type": "longrope", **LISTS, "original_max_position_embeddings": 32768}}, (1.0, 1.0), (32768, 32768)),
        # Phi-4-mini: three quarters of a head
        ({"model_type": "phi3", "num_attention_heads": 3, "partial_rotary_factor": 0.77, "original_max_position_embeddings": 4096,
          "max_position_embeddings": 131072, "rope_scaling": {"type": "longrope", **LISTS, "attention_factor": 1.5}},
         (1.5, 1.5), (4096, 131072)),
    ],
    ids=["phi3", "phimoe", "phi3small", "minicpm", "minicpm3", "phi4"],
)  # fmt: skip
def test_configs_as_they_were_published(
    values: dict[str, Any], attention: tuple[float, float], windows: tuple[int, int]
) -> None:
    found = read({key: value for key, value in config(**values).items() if value is not None})
    assert found.long_factor == tuple(map(to_float32, RISING))
    assert found.short_factor == (1.0,) * 7 + (1.5,)
    assert found.long_attention_factor == pytest.approx(attention[0], rel=1e-6)
    assert found.short_attention_factor == pytest.approx(attention[1], rel=1e-6)
    assert (found.original_max_position_embeddings, found.max_position_embeddings) == windows
    assert found.rope_theta == (1e6 if values["model_type"] == "phi3small" else 1e4)


def test_a_window_that_the_config_does_not_say_can_be_given() -> None:
    values = config(rope_scaling={"type": "longrope", **LISTS, "original_max_position_embeddings": 4096})
    found = read(values, original=2048, window=8192)
    assert (found.original_max_position_embeddings, found.max_position_embeddings) == (2048, 8192)
    assert found.long_attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(2048)), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({}, InputFileError, "nothing to import"),
        ({"rope_scaling": {"rope_type": "proportional", "factor": 2.0}}, UnsupportedModelError, "no divisor expresses"),
        ({"rope_scaling": {"type": "longrope", **LISTS, "long_mscale": "a"}}, ScalingError, "long_mscale is 'a'"),
        ({"rope_scaling": {"type": "yarn", "factor": -1}}, ScalingError, "factor = -1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "hidden_size": None}, InputFileError, "hidden_size"),
    ],
)
def test_what_cannot_be_imported(changes: dict[str, Any], error: type[Exception], words: str) -> None:
    values = config(**changes)
    if "hidden_size" in changes:
        values["model_type"] = "unknown"
    with pytest.raises(error, match=words):
        read(values)


def test_folders_and_gguf_files(tmp_path: Path, gguf_file: Build) -> None:
    write(tmp_path / "config.json", json.dumps(config(rope_scaling=TYPES[1])))
    assert import_model(tmp_path) == import_model(tmp_path / "config.json")
    write(tmp_path / "config.json", json.dumps(config()))
    with pytest.raises(InputFileError, match=r"config.json: says no rope scaling; there is nothing to import"):
        import_model(tmp_path)
    sizes = {"llama.embedding_length": 64, "llama.attention.head_count": 4, "llama.block_count": 1}
    linear = gguf_file(keys={**sizes, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})
    assert import_model(linear).long_factor == (4.0,) * 8
    with pytest.raises(InputFileError, match="its keys"):
        import_model(linear, window=8192)
    with pytest.raises(InputFileError, match="nothing to import"):
        import_model(gguf_file("plain.gguf", keys=sizes))


def test_the_command(tmp_path: Path, gguf_file: Build) -> None:
    run = CliRunner().invoke
    out = str(tmp_path / "longrope.json")
    write(tmp_path / "config.json", json.dumps(config(rope_scaling=TYPES[1])))
    result = run(cli, ["import", str(tmp_path), "--out", out, "--json", "--to", "20k"])
    assert result.exit_code == 0, result.output
    written = RopeScaling.from_json(Path(out).read_text())
    assert RopeScaling.from_dict(json.loads(result.output)) == written
    assert written.max_position_embeddings == 20480

    sizes = {"llama.embedding_length": 64, "llama.attention.head_count": 4, "llama.block_count": 1}
    model = str(gguf_file(keys=sizes))
    lists = [str(write(tmp_path / name, "\n".join([value] * 8))) for name, value in (("l.csv", "3"), ("s.csv", "2"))]
    given = ["import", lists[0], "--out", out, "--model", model, "--short", lists[1], "--to", "8x", "--original", "256",
             "--attention-factor", "1.5", "--start-tokens", "2"]  # fmt: skip
    assert run(cli, given).exit_code == 1  # the output is there
    result = run(cli, [*given, "--overwrite"])
    assert "256 → 2,048 tokens" in result.output
    found = RopeScaling.from_json(Path(out).read_text())
    assert (found.long_factor, found.short_factor) == ((3.0,) * 8, (2.0,) * 8)
    assert (found.long_attention_factor, found.long_start_tokens) == (1.5, 2)

    for wrong in (["--model", model], ["--to", "4k"], []):
        assert run(cli, ["import", lists[0], "--out", out, *wrong]).exit_code == 2
    for wrong in (
        ["--model", model],
        ["--short", lists[1]],
        ["--attention-factor", "1"],
        ["--start-tokens", "1"],
        ["--to", "4x"],
    ):
        assert run(cli, ["import", str(tmp_path), "--out", out, *wrong]).exit_code == 2
