"""`longrope convert --with`: the script runs, its file gets the factors, and nothing half-written is ever left.

The script here is a stand-in of a few lines around this project's own writer; the slow test runs llama.cpp's own, whose
path is in CONVERT_HF_TO_GGUF, or which pip downloads with the sources of llama-cpp-python.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.cli.main import cli
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.converters.with_script import convert_with
from longrope_export.errors import (
    InputFileError,
    LossyTargetError,
    OutputError,
    RuntimeFailure,
    ScalingError,
    UnsupportedModelError,
)
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_shards import read_gguf
from longrope_export.formats.gguf_tensors import read_raw
from longrope_export.formats.records import read_scaling
from longrope_export.runtimes import llamacpp

Record = Callable[..., RopeScaling]
# What the stock script does with an extended folder: the type's name, the longer window, no factors.
STAND_IN = """
import json, pathlib, sys, tempfile
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.rewrite import GgufChanges, rewrite_gguf
from longrope_export.formats.gguf_header import read_gguf_header

model, out = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
dtype = sys.argv[sys.argv.index("--outtype") + 1] if "--outtype" in sys.argv else "f32"
(pathlib.Path(__file__).parent / "ran").touch()
print("converting\\r 50%\\r100%")
config = json.loads((model / "config.json").read_text())
rope = config.pop("rope_scaling", None)
if rope is None:
    convert_to_gguf(model, out, dtype=dtype)
else:
    config.pop("longrope_export")
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
    with tempfile.TemporaryDirectory() as folder:
        view = pathlib.Path(folder)
        for file in model.iterdir():
            (view / file.name).symlink_to(file)
        (view / "config.json").unlink()
        (view / "config.json").write_text(json.dumps(config))
        convert_to_gguf(view, out, dtype=dtype)
    header = read_gguf_header(out)
    architecture = header.get("general.architecture")
    rewrite_gguf(header, out, GgufChanges(entries={f"{architecture}.rope.scaling.type": "longrope"}), overwrite=True)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "llama.cpp" / "convert_hf_to_gguf.py"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "m.gguf"


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def test_the_script_s_file_gets_the_factors(
    small_llama: Path, record: Record, script: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "longrope.json").write_text(record(32).to_json())
    options = ["--scaling", tmp_path / "longrope.json", "--out", out, "--with", script, "--json"]
    done = run(small_llama, *options, "--", "--outtype", "q8_0")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert (result["path"], result["bytes"], result["lossy"]) == (str(out), out.stat().st_size, [])
    assert any("context shift" in note for note in result["notes"])
    convert_to_gguf(small_llama, tmp_path / "plain.gguf", dtype="q8_0")
    patch_gguf(tmp_path / "plain.gguf", tmp_path / "patched.gguf", record(32))
    ours, wanted = read_gguf_header(out), read_gguf_header(tmp_path / "patched.gguf")
    assert {key: ours.get(key) for key in ours.metadata} == {key: wanted.get(key) for key in wanted.metadata}
    assert {info.name: read_raw(ours, info.name) for info in ours.tensors} == {
        info.name: read_raw(wanted, info.name) for info in wanted.tensors
    }
    assert list(out.parent.iterdir()) == [out]


def test_an_extended_folder_needs_no_scaling_option(
    small_llama: Path, record: Record, script: Path, out: Path, tmp_path: Path
) -> None:
    write_hf_folder(small_llama, tmp_path / "hf", record(32))
    assert run(tmp_path / "hf", "--out", out, "--with", script).exit_code == 0
    assert read_scaling(out) == record(32)
    assert read_gguf_header(out).tensor("rope_factors_long.weight") is not None
    # the window of such a file says nothing about L, but it must be the record's L'
    with pytest.raises(LossyTargetError, match="the record extends a window of 512, the file has 2048"):
        convert_with(script, tmp_path / "hf", out, record(32, max_position_embeddings=4096), overwrite=True)
    without = run(small_llama, "--out", out, "--overwrite", "--with", script)
    assert "no record to embed: " in str(without.exception)
    assert isinstance(without.exception, ScalingError)


def test_a_failing_script_becomes_one_line_and_leaves_nothing(
    small_llama: Path, record: Record, script: Path, out: Path
) -> None:
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[3]).write_text('GGUF')\n"
                      "raise NotImplementedError('no pre-tokenizer\\nfor this one')")  # fmt: skip
    with pytest.raises(RuntimeFailure) as caught:
        convert_with(script, small_llama, out, record(32))
    assert str(caught.value) == f"{script} ended with exit code 1: for this one"
    script.write_text("print('Error: half \\r a bar')")
    with pytest.raises(RuntimeFailure, match="wrote no GGUF file: a bar"):
        convert_with(script, small_llama, out, record(32))
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(RuntimeFailure, match="ended by SIGKILL: it printed nothing"):
        convert_with(script, small_llama, out, record(32))
    script.write_text("import sys, pathlib\npathlib.Path(sys.argv[3]).write_text('GGUF')")
    with pytest.raises(InputFileError, match="truncated"):
        convert_with(script, small_llama, out, record(32))
    assert list(out.parent.iterdir()) == []


def test_what_is_wrong_is_refused_before_the_script_runs(
    small_llama: Path, record: Record, script: Path, out: Path, tmp_path: Path
) -> None:
    for options in (["--outfile=x"], ["--outf", "x"], ["--mm"], ["--outtype", "f16", "--dry-run"]):
        with pytest.raises(OutputError, match=r"is not passed on to convert_hf_to_gguf.py"):
            convert_with(script, small_llama, out, record(32), options=options)
    with pytest.raises(InputFileError, match=r"llama.cpp is not a file; name the convert_hf_to_gguf.py"):
        convert_with(script.parent, small_llama, out, record(32))
    with pytest.raises(InputFileError, match="no model folder"):
        convert_with(script, tmp_path, out, record(32))
    with pytest.raises(ScalingError, match="the model needs 16"):
        convert_with(script, small_llama, out, record(64))
    with pytest.raises(OutputError, match="does not exist"):
        convert_with(script, small_llama, tmp_path / "no" / "m.gguf", record(32))
    with pytest.raises(UnsupportedModelError, match="architecture llama cannot be written as phi3"):
        convert_with(script, small_llama, out, record(32), architecture="phi3")
    gemma = tmp_path / "gemma"
    gemma.mkdir()
    config = {"model_type": "gemma2", "head_dim": 32, "hidden_size": 64, "num_attention_heads": 2}
    (gemma / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="no long and short factors in architecture gemma2"):
        convert_with(script, gemma, out, record(32))
    (gemma / "config.json").write_text("{}")
    with pytest.raises(InputFileError, match="no model_type"):
        convert_with(script, gemma, out, record(32))
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        convert_with(script, small_llama, out, record(32))
    assert not (script.parent / "ran").exists()
    assert run(small_llama, "--out", out, "--", "--outtype", "f16").exit_code == 2
    assert run(small_llama, "--out", out, "--with", script, "--dtype", "f16").exit_code == 2
    assert run(script, "--out", out, "--with", script).exit_code == 2
    assert not (script.parent / "ran").exists()
    convert_with(script, small_llama, out, record(32), overwrite=True)
    assert read_scaling(out) == record(32)
    assert (script.parent / "ran").exists()


def test_output_is_handed_on_and_ctrl_c_ends_the_script(
    small_llama: Path, record: Record, script: Path, out: Path, tmp_path: Path
) -> None:
    said: list[bytes] = []
    convert_with(script, small_llama, out, record(32), echo=said.append)
    assert b"converting\r 50%" in b"".join(said)
    script.write_text("import os, time, pathlib\npathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))\n"
                      "print('ready')\ntime.sleep(60)")  # fmt: skip

    def interrupt(block: bytes) -> None:
        raise KeyboardInterrupt

    out.unlink()
    with pytest.raises(KeyboardInterrupt):
        convert_with(script, small_llama, out, record(32), echo=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int(script.with_name("pid").read_text()), 0)
    assert list(out.parent.iterdir()) == []


def test_a_split_model_keeps_its_shards(
    small_llama: Path, record: Record, script: Path, out: Path, tmp_path: Path
) -> None:
    from gguf import GGUFWriter

    folder = tmp_path / "split"
    folder.mkdir()
    convert_to_gguf(small_llama, tmp_path / "plain.gguf", dtype="f32")
    split(GGUFWriter, tmp_path / "plain.gguf", folder / "model.gguf")
    script.write_text(f"import sys, pathlib, shutil\nfor file in pathlib.Path({str(folder)!r}).iterdir():\n"
                      "    shutil.copy(file, pathlib.Path(sys.argv[3]).parent)")  # fmt: skip
    first, _ = convert_with(script, small_llama, out, record(32))
    count = len(list(folder.iterdir()))
    assert count > 1
    assert first == out.with_name(f"m-00001-of-{count:05}.gguf")
    assert len(list(out.parent.iterdir())) == count
    assert read_scaling(first) == record(32)
    assert len(read_gguf(first).all_tensors) == len(read_gguf(tmp_path / "plain.gguf").tensors) + 2


def split(writer_class: Any, source: Path, target: Path) -> None:
    """`source` in shards of 8 tensors, by gguf's own writer."""
    header = read_gguf_header(source)
    writer = writer_class(target, header.get("general.architecture"), split_max_tensors=8)
    for key, entry in header.metadata.items():
        if not entry.is_array and key != "general.architecture":
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
            add[type(entry.value)](key, entry.value)
    for info in header.tensors:
        writer.add_tensor(info.name, np.frombuffer(read_raw(header, info.name), np.float32).reshape(info.shape[::-1]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def stock_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.environ.get("CONVERT_HF_TO_GGUF"):
        return Path(os.environ["CONVERT_HF_TO_GGUF"])
    folder = tmp_path_factory.mktemp("sources")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python",
               "llama-cpp-python==0.3.36", "-d", str(folder)]  # fmt: skip
    subprocess.run(command, check=True)
    parts = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        inside = [item for item in archive if "vendor/llama.cpp/" in item.name]
        wanted = [item for item in inside if item.name.split("vendor/llama.cpp/")[1].split("/")[0] in parts]
        archive.extractall(folder, members=wanted, filter="data")
    return next(folder.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.model of 608 tokens: the script knows only published byte-level tokenizers."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("spm")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:6]
    lines = [line for file in files for line in file.read_text().splitlines() if 0 < len(line) < 400]
    (folder / "corpus.txt").write_text("\n".join(lines))
    spm.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=608, model_type="bpe",
        byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return folder / "tokenizer.model"


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.parametrize(
    ("family", "architecture", "options"),
    [("llama", "llama", []), ("qwen2", "llama", ["--split-max-tensors", "9"]), ("apertus", "apertus", [])],
)
def test_the_stock_script_with_factors_equals_transformers(
    stock_script: Path, sentencepiece_model: Path, small_config: dict[str, Any], record: Record, out: Path,
    tmp_path: Path, family: str, architecture: str, options: list[str],
) -> None:  # fmt: skip
    """apertus is in no table here: any family goes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    rope = {"rope_type": "default", "rope_theta": 1e4}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**small_config, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2})
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "hf")
    shutil.copy(sentencepiece_model, tmp_path / "hf")
    scaling = record(32)
    options = ["--outtype", "f32", *options]
    first, _ = convert_with(stock_script, tmp_path / "hf", out, scaling, options=options)
    assert read_gguf(first).get("general.architecture") == architecture
    assert read_scaling(first) == scaling
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 1e4, "long_factor": list(scaling.long_factor),
        "short_factor": list(scaling.short_factor), "attention_factor": scaling.long_attention_factor,
        "original_max_position_embeddings": 512, "factor": 4.0,
    }  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2048}))
    extended = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for length, context in ((300, 512), (700, 1024)):
        prompt = [(7 * index * index + 3) % 590 + 2 for index in range(length)]
        ours = llamacpp.next_token_probabilities(first, [prompt], context=context)[0]
        with torch.no_grad():
            wanted, dropped = (
                net(torch.tensor([prompt]), use_cache=False).logits[0, -1].log_softmax(-1).numpy()
                for net in (extended, plain)
            )
        assert np.abs(ours - wanted).max() < 1e-3
        assert np.abs(ours - dropped).max() > 0.1
