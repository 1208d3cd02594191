"""`longrope extend --data`: searched factors, written to both formats and proven, on the embedded model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from longrope_export.cli.extend import extend
from longrope_export.demo import demo_model_path
from longrope_export.evaluation.stdlib_corpus import documents
from longrope_export.files import check_manifest
from longrope_export.formats.records import read_scaling


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for entry in documents("search")[:6]:
        (folder / f"{entry.name}.txt").write_text(entry.text)
    return folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(extend, [str(argument) for argument in arguments], catch_exceptions=False)


SEARCH = ("--budget", "24", "--documents", "2", "--seed", "1")


@pytest.fixture(scope="module")
def extended(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What was written, and what was printed."""
    target = tmp_path_factory.mktemp("extended") / "longer"
    result = run(demo_model_path(), "--to", "2x", "--data", texts, "--out", target, *SEARCH, "--json")
    assert result.exit_code == 0, result.stderr
    return target, json.loads(result.stdout)


def test_a_folder_becomes_a_proven_folder_and_gguf(extended: tuple[Path, Any]) -> None:
    target, values = extended
    assert values["verdict"] == "pass"
    assert values["table"][0] == ["factors", "search texts", "validation texts"]
    scaling = read_scaling(target)
    assert scaling == read_scaling(target / values["gguf"])
    assert (scaling.original_max_position_embeddings, scaling.max_position_embeddings) == (256, 512)
    assert scaling.provenance["seed"] == 1
    assert scaling.long_start_tokens == 0  # a GGUF comes out of the same record
    assert scaling.long_attention_factor == scaling.short_attention_factor == 1.0
    assert {"journal.jsonl", "search.png"} <= set(check_manifest(target))
    assert not target.with_name("longer.search").exists()
    card = (target / "README.md").read_text()
    assert "| factors | search texts | validation texts |" in card
    ((shown, file),) = re.findall(r"!\[(.*)\]\((.*)\)", card)
    assert file == "search.png"
    # The closed forms' losses of the figure are those of the table.
    rows = {row[0]: row[2] for row in values["table"][1:]}
    forms = dict(re.findall(r"([\w-]+) (\d\.\d{4})", shown.partition("Closed forms: ")[2]))
    assert len(forms) >= 2
    assert {name: f"{math.exp(float(loss)):.2f}" for name, loss in forms.items()} == {
        name: f"{float(rows[name]):.2f}" for name in forms
    }


def test_a_stopped_search_is_continued_and_the_output_is_the_same(
    texts: Path, extended: tuple[Path, Any], tmp_path: Path
) -> None:
    whole, broken = extended[0], tmp_path / "broken"
    arguments = ("--to", "2x", "--data", texts, *SEARCH, "--no-verify", "--no-gguf", "--for", "gguf")
    journal = (whole / "journal.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "broken.search").mkdir()
    (tmp_path / "broken.search" / "journal.jsonl").write_text("".join(journal[: len(journal) // 2]))
    assert run(demo_model_path(), *arguments, "--out", broken).exit_code == 0
    assert read_scaling(broken) == read_scaling(whole)


def test_what_a_gguf_cannot_hold_is_refused_before_the_search(texts: Path, tmp_path: Path) -> None:
    result = run(demo_model_path(), "--to", "2x", "--data", texts, "--for", "hf", "--gguf", "--out", tmp_path / "o")
    assert result.exit_code == 2
    assert "--for hf may find what a GGUF cannot hold" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_short_texts_are_refused_and_leave_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from longrope_export.cli.main import main

    (tmp_path / "short.txt").write_text("def f():\n    return 1\n")
    with pytest.raises(SystemExit) as exit_info:
        main(
            [
                "extend",
                str(demo_model_path()),
                "--to",
                "2x",
                "--data",
                str(tmp_path / "short.txt"),
                "--out",
                str(tmp_path / "o"),
            ]
        )
    assert exit_info.value.code == 1
    assert "512" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert not (tmp_path / "o.search").exists()
