"""`longrope export`: one folder for both worlds from one record, from either kind of source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.cli.main import cli
from longrope_export.converters.export import export_model
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.hf_folder import gguf_to_hf_folder
from longrope_export.errors import LossyTargetError, OutputError, ScalingError, UnsupportedModelError
from longrope_export.files import check_manifest
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_tensors import read_raw
from longrope_export.formats.records import read_scaling

Record = Callable[..., RopeScaling]


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def small_gguf(small_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_llama` as a Q8_0 GGUF."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    convert_to_gguf(small_llama, path, dtype="q8_0")
    return path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["export", *map(str, arguments)])


def logits(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(path)(torch.arange(2, 600)[None]).logits


def test_from_a_folder(small_llama: Path, record: Record, tmp_path: Path) -> None:
    (tmp_path / "longrope.json").write_text(record(32).to_json())
    out = tmp_path / "out"
    done = run(small_llama, "--scaling", tmp_path / "longrope.json", "--out", out, "--dtype", "q8_0", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["gguf"] == str(out / "llama.gguf")
    assert result["lossy"] == []
    assert any("context shift" in note for note in result["notes"])
    assert read_scaling(out) == read_scaling(out / "llama.gguf") == record(32)
    assert {"llama.gguf", "config.json", "model.safetensors", "tokenizer.json"} < set(check_manifest(out))
    assert read_gguf_header(out / "llama.gguf").get("general.file_type") == 7
    assert isinstance(run(small_llama, "--scaling", out, "--out", out).exception, OutputError)


def test_from_a_gguf_the_weights_stay_quantised_and_transformers_gets_them(
    small_gguf: Path, small_llama: Path, record: Record, tmp_path: Path, corpus: list[str], digit_tokenizer: Any
) -> None:
    from transformers import AutoTokenizer

    result = export_model(small_gguf, tmp_path / "out", record(32))
    before, after = read_gguf_header(small_gguf), read_gguf_header(tmp_path / "out" / "small.gguf")
    for info in before.tensors:
        assert read_raw(before, info.name) == read_raw(after, info.name)
    assert result.gguf == tmp_path / "out" / "small.gguf"
    assert read_scaling(tmp_path / "out") == record(32)
    assert set(check_manifest(tmp_path / "out")) > {"small.gguf", "longrope.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    export_model(small_llama, tmp_path / "reference", record(32), gguf=False)
    exact, dequantised = logits(tmp_path / "reference"), logits(tmp_path / "out")
    assert 0 < (exact - dequantised).abs().mean() < 0.1 * exact.abs().mean()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(corpus)["input_ids"] == digit_tokenizer(corpus)["input_ids"]


def test_a_patched_gguf_can_be_exported_again(small_gguf: Path, record: Record, tmp_path: Path) -> None:
    export_model(small_gguf, tmp_path / "first", record(32), hf=False)
    assert sorted(check_manifest(tmp_path / "first")) == ["longrope.json", "small.gguf"]
    other = record(32, max_position_embeddings=4096)
    export_model(tmp_path / "first" / "small.gguf", tmp_path / "second", other)
    assert read_scaling(tmp_path / "second") == other
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["rope_parameters"]["original_max_position_embeddings"] == 512
    assert config["max_position_embeddings"] == 4096


@pytest.mark.parametrize(("dtype", "stored"), [("f32", "F32"), ("f16", "F16"), ("bf16", "BF16")])
def test_dtype_of_the_folder_made_from_a_gguf(
    small_gguf: Path, record: Record, tmp_path: Path, dtype: str, stored: str
) -> None:
    from longrope_export.formats.safetensors_header import read_safetensors_header

    gguf_to_hf_folder(small_gguf, tmp_path / "out", record(32), dtype=dtype)
    header = read_safetensors_header(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in header.tensors.values()} == {stored}


def test_no_gguf_and_no_hf(small_llama: Path, record: Record, tmp_path: Path) -> None:
    (tmp_path / "longrope.json").write_text(record(32).to_json())
    scaling = ["--scaling", tmp_path / "longrope.json"]
    done = run(small_llama, *scaling, "--out", tmp_path / "hf", "--no-gguf")
    assert done.exit_code == 0, done.output
    assert "window 512 → 2048" in done.stdout
    assert not list((tmp_path / "hf").glob("*.gguf"))
    assert run(small_llama, *scaling, "--out", tmp_path / "gguf", "--no-hf").exit_code == 0
    assert sorted(check_manifest(tmp_path / "gguf")) == ["llama.gguf", "longrope.json"]
    done = run(small_llama, *scaling, "--out", tmp_path / "none", "--no-hf", "--no-gguf")
    assert done.exit_code == 2
    assert "leave nothing to write" in done.stderr


def test_losses_are_refused_before_anything_is_written(
    small_llama: Path, small_gguf: Path, record: Record, tmp_path: Path
) -> None:
    lossy = record(32, long_start_tokens=4)
    (tmp_path / "longrope.json").write_text(lossy.to_json())
    for source in (small_llama, small_gguf):
        with pytest.raises(LossyTargetError, match="n̂ = 4"):
            export_model(source, tmp_path / "out", lossy)
        with pytest.raises(ScalingError, match="has 8 factors"):
            export_model(source, tmp_path / "out", record(16))
    assert [path.name for path in tmp_path.iterdir()] == ["longrope.json"]
    done = run(small_llama, "--scaling", tmp_path / "longrope.json", "--out", tmp_path / "out", "--allow-lossy")
    assert [line.split(":")[0] for line in done.stdout.splitlines() if "n̂ = 4" in line] == ["lost", "lost"]
    assert read_scaling(tmp_path / "out") == lossy


def test_an_hf_folder_cannot_be_q8_0(small_gguf: Path, record: Record, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="an HF folder cannot be 'q8_0'"):
        export_model(small_gguf, tmp_path / "out", record(32), dtype="q8_0")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_pre_tokenizer_is_reported(small_gguf: Path, record: Record, tmp_path: Path) -> None:
    raw = small_gguf.read_bytes()
    assert raw.count(b"\x06\0\0\0\0\0\0\0smollm") == 1
    (tmp_path / "odd.gguf").write_bytes(raw.replace(b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0viking"))
    with pytest.raises(LossyTargetError, match="'viking' is not known here"):
        export_model(tmp_path / "odd.gguf", tmp_path / "out", record(32))
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]
