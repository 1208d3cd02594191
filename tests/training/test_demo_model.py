"""The training command from beginning to end on a small library, and every option of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from longrope_export.training import demo_model
from longrope_export.training.demo_model import Shape, main, new_model

REPORT = ("argparse", "csv", "json")
TEXT = '"""Doc {number} of {name}."""\n\n\ndef function_{number}(argument, other=None):\n    return argument + {number}\n\n'


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for name in (*REPORT, "typing", "ast", "abc", "os"):
        (folder / f"{name}.py").write_text("".join(TEXT.format(number=i, name=name) for i in range(900)))
    (folder / "test").mkdir()
    (folder / "test" / "test_abc.py").write_text("class Case: pass\n" * 50)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command's shape is fixed; a smaller one makes the test quick."""
    monkeypatch.setattr(demo_model, "Shape", lambda: Shape(400, 256, 32, 32, 1, 2, 1))


def run(*arguments: Any) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.usefixtures("small")
def test_from_a_library_to_a_model_and_its_card(library: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "demo"
    result = run("--out", out, "--steps", 3, "--trials", 2, "--library", library)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}\n"
    assert "step 3/3" in result.stderr
    assert {file.name for file in out.iterdir()} == {
        "README.md", "config.json", "heldout.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
    record = json.loads((out / "heldout.json").read_text())
    assert set(record["sha256"]["report"]) == {f"{name}.py" for name in REPORT}
    assert (record["passkey_trials"], record["window"]) == (2, 256)
    assert f"{record['report_perplexity']:.3f}" in (out / "README.md").read_text()
    assert "3 steps, 12,288 tokens" in (out / "README.md").read_text()
    assert (tmp_path / "demo.training" / "checkpoint.pt").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_options_reach_the_run(library: Path, tmp_path: Path) -> None:
    common = ["--trials", 1, "--library", library]
    first = tmp_path / "first"
    assert run("--out", first, "--state", tmp_path / "state", "--steps", 2, *common).exit_code == 0
    assert (tmp_path / "state" / "checkpoint.pt").is_file()
    weights = (first / "model.safetensors").read_bytes()

    other = tmp_path / "other"  # another state folder, other threads: the same bits
    assert run("--out", other, "--steps", 2, "--threads", 1, *common).exit_code == 0
    assert (other / "model.safetensors").read_bytes() == weights
    assert "on 1 threads" in (other / "README.md").read_text()

    refused = run("--out", other, "--steps", 2, "--seed", 1, *common)
    assert refused.exit_code == 1
    assert "other settings" in refused.stderr

    seeded = tmp_path / "seeded"
    assert run("--out", seeded, "--steps", 2, "--seed", 1, *common).exit_code == 0
    assert (seeded / "model.safetensors").read_bytes() != weights

    hurried = run("--out", tmp_path / "hurried", "--steps", 100_000, "--minutes", 0.01, *common)
    assert hurried.exit_code == 0


def test_an_empty_library_is_a_line_not_a_traceback(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run("--out", tmp_path / "demo", "--library", empty)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "no Python source files" in result.stderr
    assert not (tmp_path / "demo").exists()


def test_weights_begin_from_the_seed_and_leave_the_global_state_alone() -> None:
    shape = Shape(64, 16, 32, 32, 1, 2, 1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (new_model(shape, 64, seed).state_dict() for seed in (0, 0, 1))
    assert torch.rand(1) == expected
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])
    assert sum(parameter.numel() for parameter in new_model(Shape(), 3072, 0).parameters()) <= 3_900_000
