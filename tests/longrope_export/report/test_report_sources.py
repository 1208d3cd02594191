"""What is found in a folder, and that broken or hostile files get a clear line and never hide the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_inputs import evaluation, journal, record, write_results

from longrope_export.errors import InputFileError
from longrope_export.report import json_lines, searches, sources
from longrope_export.report.evaluations import read_evaluation
from longrope_export.report.sources import find_sources


def test_everything_is_found(results: Path) -> None:
    found = find_sources(results)
    assert [each.name for each in found.evaluations] == ["eval"]
    assert [name for name, _ in found.records] == ["search"]
    assert [run.name for run in found.searches] == ["search"]
    assert [log.name for log in found.training] == ["results"]
    assert {entry.name: entry.there for entry in found.manifest} == {
        "eval/result.json": True, "log.jsonl": True, "search/journal.jsonl": True, "search/longrope.json": True,
    }  # fmt: skip
    assert found.left_out == []


def test_a_file_that_the_manifest_names_and_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = write_results(tmp_path / "results")
    (folder / "log.jsonl").write_text("cut")
    values = json.loads((folder / "manifest.json").read_text())
    values["files"]["../../etc/passwd"] = {"size": 1, "sha256": "x"}
    (folder / "manifest.json").write_text(json.dumps(values))
    there = {entry.name: entry.there for entry in find_sources(folder).manifest}
    assert not there["log.jsonl"]
    assert not there["../../etc/passwd"]
    assert there["eval/result.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format="longrope-eval/9"), "this version reads 'longrope-eval/1'"),
        (lambda v: v.update(window="wide"), "window is 'wide'; it must be a finite number"),
        (lambda v: v.update(window=True), "window is True"),
        (lambda v: v.update(window=1.5), "window is 1.5; it must be a whole number"),
        (lambda v: v.update(rows={"a": 1}), "rows is {'a': 1}; it must be a list"),
        (lambda v: v.update(rows=[3]), r"rows\[0\] is 3; it must be an object"),
        (lambda v: v.update(tasks=[]), r"tasks is \[\]; it must be an object"),
        (lambda v: v["rows"][1]["scaling"].update(rotary_dim=7), r"rows\[1\].scaling: rotary_dim is 7; it must be even"),
        (lambda v: lengths(v)[0].update(perplexity=-1.0), r"lengths\[0\].perplexity is -1; it must be greater than 0"),
        (lambda v: lengths(v)[0].update(perplexity="9"), r"unchanged.lengths\[0\].perplexity is '9'"),
        (lambda v: needle(v).update(correct=[[4, 4]]), "correct must have a row for each length"),
        (lambda v: needle(v).update(correct=[[4, 4], [0, 0], [0, -1]]), "correct must hold counts"),
        (lambda v: needle(v).update(correct=[[5, 4], [0, 0], [0, 0]]), "more right answers than trials"),
        (lambda v: v["versions"].update(torch=2), "versions.torch is 2; it must be a text"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_named_by_its_place(change: Callable[[Any], None], message: str) -> None:
    values = evaluation()
    change(values)
    with pytest.raises(InputFileError, match=message):
        read_evaluation(values, "result")


def lengths(values: Any) -> Any:
    return values["tasks"]["perplexity"]["rows"]["unchanged"]["lengths"]


def needle(values: Any) -> Any:
    return values["tasks"]["needle"]["rows"]["unchanged"]["forced"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": "longrope-eval/1", "window": NaN}', "it holds NaN"),
        ('{"format": "longrope-eval/1", "window": 1e999}', "it holds 1e999"),
        ('{"format": "longrope-eval/1", "format": 1}', "duplicate key"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"format": "longrope-export/1"}', "incomplete"),
        ('{"format": "longrope-eval/1", "tasks": 3}', "tasks is 3"),
    ],
)  # fmt: skip
def test_a_broken_file_gets_a_line_and_the_rest_is_shown(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    (tmp_path / "longrope.json").write_text(record().to_json())
    found = find_sources(tmp_path)
    assert len(found.records) == 1
    (line,) = found.left_out
    assert line.startswith("bad.json: ")
    assert message in line
    assert "\n" not in line


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "longrope.json").write_text(record().to_json())
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(1 << 25)
    with (tmp_path / "journal.jsonl").open("wb") as file:
        file.truncate(json_lines.MAX_BYTES + 1)
    found = find_sources(tmp_path)
    assert [line.partition(":")[0] for line in found.left_out] == ["huge.json", "journal.jsonl"]
    assert all("bytes" in line for line in found.left_out)


@pytest.mark.parametrize(
    "line", ["{", '{"trial": 0, "of": ["search"], "loss": 1}', '{"of": ["search", 0, false, [], 1]}', "3"]
)
def test_a_broken_line_of_a_journal_is_named(line: str, tmp_path: Path) -> None:
    path = journal(tmp_path / "journal.jsonl")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputFileError, match="line 14"):
        searches.read_search(path, "search")


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    path = journal(tmp_path / "journal.jsonl")
    whole = searches.read_search(path, "search")
    path.write_text(path.read_text() + '{"trial": 99, "of"')
    assert searches.read_search(path, "search") == whole


def test_the_journal_s_format_is_the_search_s_own() -> None:
    from longrope_export.search.journal import FORMAT
    from longrope_export.search.plan import GRADIENT_UNITS

    assert searches.FORMAT == FORMAT
    assert searches.GRADIENT_UNITS == GRADIENT_UNITS


def test_the_result_s_format_is_the_evaluation_s_own() -> None:
    from longrope_export.evaluation import journal as evaluation_journal
    from longrope_export.evaluation import results as evaluation_results
    from longrope_export.report import evaluations

    assert evaluations.FORMAT == evaluation_results.FORMAT
    assert sources.RESULT_FILE == evaluation_results.RESULT
    assert evaluation_journal.FORMAT.startswith("longrope-eval")


def test_a_population_is_shown_by_its_candidates(tmp_path: Path) -> None:
    run = searches.read_search(journal(tmp_path / "journal.jsonl", "evolution"), "search")
    assert run.population
    assert [x for x, _ in run.steps] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert [loss for _, loss in run.steps] == pytest.approx([2.65 - 0.05 * step for step in range(6)])
    assert searches.best_so_far(((1.0, 3.0), (2.0, 4.0), (3.0, 2.0))) == ((1.0, 3.0), (2.0, 3.0), (3.0, 2.0))
    # Without a record the closed forms are those that the configuration names, in the order they are measured in.
    assert run.closed_forms == {"yarn": pytest.approx(2.4), "pi": pytest.approx(2.9)}
    assert not run.complete


def test_a_stopped_evaluation_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "longrope.json").write_text(record().to_json())
    (tmp_path / "journal.jsonl").write_text('{"format": "longrope-eval-journal/1"}\n')
    (line,) = find_sources(tmp_path).left_out
    assert "run the same command again" in line
    (tmp_path / "result.json").write_text(json.dumps(evaluation()))
    assert find_sources(tmp_path).left_out == []


def test_links_hidden_folders_and_the_report_itself_are_passed_over(tmp_path: Path) -> None:
    folder, outside = tmp_path / "results", tmp_path / "outside"
    for place in (folder / "report", folder / ".hidden", outside, folder / "a" / "b" / "c" / "deep"):
        place.mkdir(parents=True)
        (place / "longrope.json").write_text(record(long_attention_factor=1.5).to_json())
    (folder / "link.json").symlink_to(outside / "longrope.json")
    (folder / "linked").symlink_to(outside)
    (folder / "longrope.json").write_text(record().to_json())
    assert [name for name, _ in find_sources(folder, skip=folder / "report").records] == ["results"]


def test_factors_of_a_model_s_own_files_are_found(tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "head_dim": 16,
        "max_position_embeddings": 1024, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 256,
            "long_factor": list(record().long_factor), "short_factor": [1.0] * 8, "attention_factor": 1.0,
        },
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    ((name, scaling),) = find_sources(tmp_path).records
    assert name == "config.json"
    assert scaling.long_factor == record().long_factor


@pytest.mark.parametrize("name", ["missing", "file.json", "empty"])
def test_a_folder_with_nothing_to_show_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFileError, match="not a folder" if name != "empty" else "longrope eval --out"):
        find_sources(tmp_path / name)


def test_a_folder_with_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MOST_ENTRIES", 3)
    for index in range(4):
        (tmp_path / f"{index}.txt").touch()
    with pytest.raises(InputFileError, match="over 3 files"):
        find_sources(tmp_path)
