"""`longrope describe`: model folders, their existing scaling, and what the command prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from describe_inputs import CONFIG, YARN, File, Folder

from longrope_export.cli.main import main
from longrope_export.description import describe
from longrope_export.errors import InputFileError
from longrope_export.honours import RUNTIMES


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


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


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
