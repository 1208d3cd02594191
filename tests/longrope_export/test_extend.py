"""`longrope extend` without a search: closed-form factors in the same quantised file, in seconds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from longrope_export.cli.extend import extend
from longrope_export.cli.main import main
from longrope_export.demo import demo_model_path
from longrope_export.files import check_manifest
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_tensors import read_raw
from longrope_export.formats.records import read_scaling
from longrope_export.rope.methods import METHODS, method_factors


def run(*arguments: object) -> Result:
    return CliRunner().invoke(extend, [str(argument) for argument in arguments], catch_exceptions=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal, with exit code 1."""
    with pytest.raises(SystemExit) as exit_info:
        main(["extend", *(str(argument) for argument in arguments)])
    assert exit_info.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def write_llama3_gguf(path: Path, freqs: np.ndarray[Any, Any]) -> None:
    """A two-tensor Llama-3.1-like GGUF: `rope_freqs.weight` stands between the weights."""
    writer = gguf.GGUFWriter(str(path), "llama")
    for key, value in (
        ("context_length", 131072),
        ("embedding_length", 64),
        ("block_count", 1),
        ("feed_forward_length", 64),
        ("vocab_size", 1),
    ):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_uint32("llama.rope.dimension_count", 32)
    writer.add_float32("llama.rope.freq_base", 500000.0)
    writer.add_tensor("token_embd.weight", np.arange(64, dtype=np.float32).reshape(1, 64))
    writer.add_tensor("rope_freqs.weight", freqs.astype(np.float32))
    writer.add_tensor("output_norm.weight", np.full(64, 7, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("method", [name for name in METHODS if name != "abf"])
def test_every_method_is_embedded_in_the_same_file(smollm2: Path, tmp_path: Path, method: str) -> None:
    target = tmp_path / "longer.gguf"
    assert run(smollm2, "--to", "4x", "--method", method, "--out", target, "--json").exit_code == 0
    scaling = read_scaling(target)
    expected = method_factors(
        method, rope_theta=1e5, rotary_dim=64, original_max_position_embeddings=8192, max_position_embeddings=32768
    )
    np.testing.assert_array_equal(np.float32(scaling.long_factor), expected.factors.astype(np.float32))
    assert scaling.max_position_embeddings == 32768


def test_no_weight_is_touched(smollm2: Path, tmp_path: Path) -> None:
    target = tmp_path / "longer.gguf"
    run(smollm2, "--to", "16k", "--method", "yarn", "--out", target)
    before, after = read_gguf_header(smollm2), read_gguf_header(target)
    for info in before.tensors:
        assert bytes(read_raw(after, info.name)) == bytes(read_raw(before, info.name))
    assert after.get("llama.context_length") == 16384


def test_original_short_factors_keep_attention_at_one(smollm2: Path, tmp_path: Path) -> None:
    target = tmp_path / "longer.gguf"
    run(smollm2, "--to", "4x", "--method", "yarn", "--short", "original", "--out", target)
    scaling = read_scaling(target)
    assert set(scaling.short_factor) == {1.0}
    assert max(scaling.long_factor) > 1
    assert scaling.long_attention_factor == scaling.short_attention_factor == 1.0


def test_attention_factor_replaces_the_methods_own(smollm2: Path, tmp_path: Path) -> None:
    target = tmp_path / "longer.gguf"
    run(smollm2, "--to", "4x", "--method", "yarn", "--attention-factor", "1.25", "--out", target)
    assert read_scaling(target).long_attention_factor == 1.25


def test_method_options_reach_the_method(smollm2: Path, tmp_path: Path) -> None:
    target = tmp_path / "longer.gguf"
    run(smollm2, "--to", "4x", "--method", "abf", "--option", "new_rope_theta=1e6", "--out", target)
    assert read_scaling(target).long_factor[-1] == pytest.approx(10 ** (62 / 64), rel=1e-6)


def test_llama3_scaling_is_composed_and_its_tensor_goes(tmp_path: Path) -> None:
    freqs = np.where(np.arange(16) < 8, 1.0, 8.0)
    write_llama3_gguf(tmp_path / "llama3.gguf", freqs)
    target = tmp_path / "longer.gguf"
    assert run(tmp_path / "llama3.gguf", "--to", "4x", "--method", "ntk", "--out", target).exit_code == 0
    header = read_gguf_header(target)
    assert header.tensor("rope_freqs.weight") is None
    np.testing.assert_array_equal(np.frombuffer(read_raw(header, "output_norm.weight"), np.float32), 7)
    scaling = read_scaling(target)
    own = method_factors(
        "ntk", rope_theta=5e5, rotary_dim=32, original_max_position_embeddings=131072, max_position_embeddings=524288
    )
    np.testing.assert_allclose(scaling.long_factor, freqs * own.factors, rtol=1e-6)
    assert scaling.original_max_position_embeddings == 131072


def test_folder_output_has_record_card_and_manifest(smollm2: Path, tmp_path: Path) -> None:
    target = tmp_path / "longer"
    run(smollm2, "--to", "32k", "--method", "ntk", "--out", target)
    gguf = "SmolLM2-135M-Instruct.Q4_1-32k.gguf"
    assert set(check_manifest(target)) == {"README.md", "factors.png", "longrope.json", gguf}
    assert read_scaling(target / "longrope.json") == read_scaling(target / gguf)
    card = (target / "README.md").read_text()
    assert "extended to 32,768" in card
    assert f"llama-server -m {gguf} -c 32768" in card
    # Nothing was measured: the figure is that of the factors.
    assert "Before and after" not in card
    assert re.search(r"!\[Rescale factors by .* ntk from 1 to 4\. .*\]\(factors\.png\)", card)


def test_hf_folder_output(tiny_llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "longer"
    assert run(tiny_llama, "--to", "4x", "--method", "yarn", "--no-gguf", "--out", target).exit_code == 0
    assert read_scaling(target).max_position_embeddings == 128
    assert json.loads((target / "config.json").read_text())["max_position_embeddings"] == 128


def test_a_gguf_name_gives_a_file_from_a_folder_too(tmp_path: Path) -> None:
    result = run(demo_model_path(), "--to", "4x", "--method", "yarn", "--out", tmp_path / "a.gguf")
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert read_gguf_header(tmp_path / "a.gguf").get("llama.context_length") == 1024


def test_a_second_extension_starts_from_the_extended_window(smollm2: Path, tmp_path: Path) -> None:
    """One set for all lengths leaves no shorter window to start from: 2x of 16,384 is 32,768, and their factors
    multiply.
    """
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert run(smollm2, "--to", "2x", "--method", "pi", "--out", first).exit_code == 0
    result = run(first, "--to", "2x", "--method", "pi", "--out", second)
    assert "window 16384 → 32768" in result.output
    record = read_scaling(second)
    assert (record.original_max_position_embeddings, record.max_position_embeddings) == (16384, 32768)
    assert set(record.long_factor) == {4.0}


def test_json_holds_the_whole_result(smollm2: Path, tmp_path: Path) -> None:
    result = json.loads(run(smollm2, "--to", "4x", "--method", "yarn", "--out", tmp_path / "a.gguf", "--json").stdout)
    assert (result["window"], result["target"], result["method"]) == (8192, 32768, "yarn")
    assert len(result["scaling"]["long_factor"]) == 32


def test_dry_run_writes_nothing(smollm2: Path, tmp_path: Path) -> None:
    assert run(smollm2, "--to", "4x", "--method", "yarn", "--out", tmp_path / "a.gguf", "--dry-run").exit_code == 0
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_unless_overwrite(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.gguf"
    target.write_text("mine")
    assert "exists already" in refused(capsys, smollm2, "--to", "4x", "--method", "yarn", "--out", target)
    assert target.read_text() == "mine"
    assert run(smollm2, "--to", "4x", "--method", "yarn", "--out", target, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "8192", "--method", "yarn"], "8,192 already"),
        (["--to", "1x", "--method", "yarn"], "8,192 already"),
        (["--to", "4x", "--method", "nothing"], "there is no method 'nothing'"),
        (["--to", "4x", "--method", "abf"], "abf needs the new base"),
        (["--to", "4x", "--method", "yarn", "--option", "beta=1"], "yarn has no option beta"),
        (["--to", "4x", "--method", "yarn", "--option", "attention_factor=2"], "yarn has no option attention_factor"),
        (["--to", "4x", "--method", "yarn", "--option", "rope_theta=5"], "yarn has no option rope_theta"),
        (["--to", "4x", "--method", "yarn", "--attention-factor", "0"], "attention_factor is 0"),
        (["--to", "3000000m", "--method", "yarn"], "3,145,728,000,000 tokens; at most 2,147,483,647"),
        (["--to", "999999999999999999x", "--method", "yarn"], "at most 2,147,483,647"),
    ],
)
def test_wrong_input_is_one_line(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert message in refused(capsys, smollm2, *arguments, "--out", tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_not_a_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(3))
    assert "truncated" in refused(
        capsys, tmp_path / "a.gguf", "--to", "4x", "--method", "yarn", "--out", tmp_path / "b"
    )
    assert "does not exist" in refused(capsys, tmp_path / "no.gguf", "--to", "4x", "--method", "yarn")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --method (closed form) or --data"),
        (["--method", "yarn", "--data", "x"], "either --method (closed form) or --data"),
        (["--method", "yarn", "--budget", "1h"], "--budget belongs to a search"),
        (["--data", "x", "--option", "a=1"], "--option belongs to --method"),
        (["--method", "yarn", "--option", "a"], "write NAME=VALUE"),
        (["--method", "yarn", "--hf", "--out", "a.gguf"], "a.gguf is the name of a GGUF file; name a folder"),
        (["--method", "yarn", "--to", "9" * 5000], "is not a length"),
    ],
)
def test_contradicting_options_are_usage_errors(smollm2: Path, arguments: list[str], message: str) -> None:
    result = run(smollm2, "--to", "4x", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
