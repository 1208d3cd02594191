"""`longrope convert --approximate … --measure TEXT`: the perplexities are the reference loader's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling, load
from longrope_export.cli.main import cli
from longrope_export.converters.approximation_cost import approximated_record, approximation_cost
from longrope_export.converters.gguf.approximate import approximation
from longrope_export.errors import LossyTargetError, ScalingError, TextTooShortError
from longrope_export.evaluation.documents import evaluation_rows, load_tokenizer
from longrope_export.evaluation.perplexity import evaluate_perplexity

Record = Callable[..., RopeScaling]
pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def text(tmp_path: Path, corpus: list[str]) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(corpus[0][:6000])
    return path


def perplexity(model: Path, scaling: RopeScaling, text: Path, length: int) -> float:
    rows = evaluation_rows([text], load_tokenizer(model), length)
    return evaluate_perplexity(load(model, scaling), rows, [length]).at(length).perplexity


def test_both_perplexities_are_the_loader_s(small_llama: Path, record: Record, text: Path) -> None:
    scaling = record(32)
    short, long = approximation_cost(small_llama, scaling, "yarn", [text], length=600)
    assert (short.length, long.length, long.documents) == (512, 600, 1)
    other = approximated_record(scaling, "yarn")
    assert other.long_factor == other.short_factor == pytest.approx(approximation("yarn", scaling).divisors)
    for cost in (short, long):
        # the window's rows are the beginnings of the longer ones
        assert cost.exact == pytest.approx(perplexity(small_llama, scaling, text, cost.length), rel=1e-5)
        assert cost.approximated == pytest.approx(perplexity(small_llama, other, text, cost.length), rel=1e-5)
        assert abs(cost.exact - cost.approximated) > 1e-3 * cost.exact
    with pytest.raises(ScalingError, match="fewer than the window of 512"):
        approximation_cost(small_llama, scaling, "yarn", [text], length=511)
    with pytest.raises(TextTooShortError):
        approximation_cost(small_llama, scaling, "yarn", [text], length=100_000)
    assert approximation_cost(small_llama, scaling, "base", [text])[-1].length == 2048


def test_the_command_measures_before_it_refuses(small_llama: Path, record: Record, text: Path, tmp_path: Path) -> None:
    from longrope_export.converters.gguf.convert import convert_to_gguf

    (tmp_path / "r.json").write_text(record(32).to_json())
    convert_to_gguf(small_llama, tmp_path / "plain.gguf", dtype="f32")
    command = ["convert", tmp_path / "plain.gguf", "--scaling", tmp_path / "r.json", "--out", tmp_path / "m.gguf"]

    def run(*options: object) -> Any:
        return CliRunner().invoke(cli, [*map(str, command), *map(str, options)])

    measure = ["--approximate", "base", "--measure", text, "--measure-at", "600"]
    refused = run(*measure)
    assert isinstance(refused.exception, LossyTargetError)
    assert refused.stderr.count("measured: perplexity at ") == 2
    done = json.loads(run(*measure, "--allow-lossy", "--json").stdout)
    wanted = approximation_cost(tmp_path / "plain.gguf", record(32), "base", [text], length=600)
    assert [(cost["length"], cost["exact"], cost["approximated"]) for cost in done["measured"]] == [
        (cost.length, pytest.approx(cost.exact), pytest.approx(cost.approximated)) for cost in wanted
    ]
    assert run("--measure", text).exit_code == 2
    assert run("--approximate", "base", "--measure-at", "600").exit_code == 2
    assert "measured" not in json.loads(run("--approximate", "base", "--allow-lossy", "--overwrite", "--json").stdout)
