"""The main job on the embedded model, with small budgets: search, compare, write, prove."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from longrope_export.cli.demo import demo
from longrope_export.demo_run import SEARCHED, SEARCHED_HF, DemoOptions, DemoResult, run_demo
from longrope_export.files import check_manifest
from longrope_export.formats.records import read_scaling

SMALL = {
    "factor": 4,
    "gradient_budget": 12,
    "gradient_documents": 4,
    "evolution_budget": 8,
    "evolution_documents": 2,
    "report_documents": 3,
    "passkeys": 2,
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    said: list[str] = []
    outcome = run_demo(DemoOptions(out=tmp_path_factory.mktemp("demo") / "out", **SMALL), said.append)
    assert len(said) >= 5
    return outcome


def test_the_table_has_every_row_and_length(result: DemoResult) -> None:
    table = result.comparison
    assert [row.name.split(" (")[0] for row in table.rows] == [
        "unchanged", "PI", "NTK", "YaRN", "Algorithm 1", SEARCHED, SEARCHED_HF,
    ]  # fmt: skip
    assert table.lengths == (256, 512, 1024)
    assert len(table.documents) == 3


def test_the_extension_works_where_the_model_alone_fails(result: DemoResult) -> None:
    table = result.comparison
    assert table.perplexity("searched", 1024) < 0.6 * table.perplexity("unchanged", 1024)
    assert table.perplexity("searched", 1024) < table.perplexity("NTK", 1024)
    assert table.short_perplexity("searched") <= 1.01 * table.short_perplexity("unchanged")
    free = next(row.scaling for row in table.rows if row.name == SEARCHED_HF)
    assert free is not None
    assert free.long_attention_factor != free.short_attention_factor == 1.0
    assert result.scaling.long_attention_factor == result.scaling.short_attention_factor == 1.0
    assert result.passkey["unchanged"][256] == 1.0
    assert result.passkey["unchanged"][1024] == 0.0
    assert result.passkey["YaRN"][1024] == 1.0


def test_both_runtimes_apply_what_was_written(result: DemoResult) -> None:
    assert result.verification is not None
    assert result.verification.verdict == "pass"
    assert {entry.regime for entry in result.verification.regimes} == {"short", "long"}


def test_every_written_file_carries_the_record(result: DemoResult) -> None:
    folder, gguf = result.written.folder, result.written.gguf
    assert folder is not None
    assert gguf is not None
    assert read_scaling(folder) == read_scaling(gguf) == read_scaling(folder / "longrope.json") == result.scaling
    assert {"README.md", "config.json", gguf.name} <= set(check_manifest(folder))
    card = (folder / "README.md").read_text()
    for name in ("unchanged", "YaRN", "Algorithm 1", "searched", f"llama-server -m {gguf.name} -c 1024"):
        assert name in card


def test_the_result_is_json(result: DemoResult) -> None:
    values = json.loads(json.dumps(result.to_dict()))
    assert values["verification"]["verdict"] == "pass"
    assert values["evaluations"]["searched"] <= SMALL["gradient_budget"]


def test_budgets_are_heeded(result: DemoResult) -> None:
    assert any(f"({SMALL['evolution_budget']} of 1,344 evaluations)" in row.name for row in result.comparison.rows)


def test_an_output_in_the_way_is_refused_before_any_work(tmp_path: Path) -> None:
    from longrope_export.errors import OutputError

    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not an empty folder"):
        run_demo(DemoOptions(out=tmp_path), lambda line: None)


def test_the_command_has_an_option_for_every_size() -> None:
    names = {option.name for option in demo.params}
    assert {"out", "gradient_budget", "evolution_budget", "report_documents", "passkeys", "seed", "as_json"} <= names


@pytest.mark.parametrize("option", ["gradient-budget", "evolution-budget", "report-documents", "passkeys"])
def test_sizes_below_one_and_negative_seeds_are_usage_errors(option: str, tmp_path: Path) -> None:
    for arguments in ([f"--{option}", "0"], ["--seed", "-1"]):
        result = CliRunner().invoke(demo, [*arguments, "--out", str(tmp_path / "out")])
        assert result.exit_code == 2
        assert arguments[0] in result.output
    assert not (tmp_path / "out").exists()
