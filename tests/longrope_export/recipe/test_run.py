"""`longrope extend --recipe` on a tiny model: every stage, stopped and continued, and refused where it must be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from flushing import flushes, noting

from longrope_export.cli.extend import extend
from longrope_export.errors import InputFileError, LongRopeError, OutputError, RecipeError, StaleStateError
from longrope_export.files import check_manifest, sha256
from longrope_export.loader import load
from longrope_export.recipe import measure
from longrope_export.recipe.measure import Measurer
from longrope_export.recipe.plan import Job, plan_recipe
from longrope_export.recipe.run import run_recipe
from longrope_export.recipe.schema import ReportPlan, parse_recipe
from longrope_export.report.numbers import perplexity_text
from longrope_export.scaling import RopeScaling

SMALL = {
    "budget": 20,
    "documents": 1,
    "validation-documents": 1,
    "threads": 1,
    "start-tokens": "0",
    "short": "original",
}
TUNE = {
    "steps": 4, "batch": 2, "warmup": 1, "learning-rate": 1e-3, "save-every": 1, "eval-documents": 1, "threads": 1,
    "log-every": 1,
}  # fmt: skip
STAGES = [
    {"name": "first", "search": {"to": "64", **SMALL, "for": "gguf"}},
    {"name": "tune", "finetune": TUNE},
    {"name": "second", "search": {"to": "128", **SMALL, "for": "gguf"}},
    {"name": "short", "recover": {**{**SMALL, "short": "search", "short-margin": 0}, "for": "gguf"}},
]
REPORT = {"lengths": [32, 64, 128], "documents": 1, "baselines": ["yarn", "pi"]}


def _recipe(stages: list[Any] = STAGES, **top: Any) -> dict[str, Any]:
    return {"window": 32, "stages": stages, "report": REPORT, **top}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    files = {}
    for number, role in enumerate(("search", "train", "report")):
        generator = np.random.default_rng(number)
        words = generator.choice(["the", "quick", "window", "of", "tokens", "grows", "by", "four"], 900)
        files[role] = folder / role
        files[role].mkdir()
        for part in range(3):
            (files[role] / f"{part}.txt").write_text(" ".join(words[part * 300 : part * 300 + 300]))
    return files


def _job(model: Path, texts: dict[str, Path], out: Path, content: dict[str, Any], **changes: Any) -> Job:
    recipe = parse_recipe(content, out.parent / "small.yaml")
    by_role = {role: (str(path),) for role, path in texts.items()}
    return Job(recipe=recipe, model=model, out=out, texts=by_role, **{"verify": False, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def done(
    tiny_folder: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, dict[str, Any]]:
    job = _job(tiny_folder, texts, tmp_path_factory.mktemp("recipe") / "out", _recipe())
    return job, run_recipe(job, lambda line: None)


def test_every_stage_works_on_what_the_one_before_left(done: tuple[Job, dict[str, Any]]) -> None:
    job, report = done
    first, second, short = (
        RopeScaling.from_json((job.out / name / "longrope.json").read_text())
        for name in ("1-first", "3-second", "4-short")
    )
    tuned = RopeScaling.from_json((job.out / "2-tune" / "tuned" / "longrope.json").read_text())
    assert (tuned.long_factor, tuned.short_factor) == (first.long_factor, first.short_factor)
    assert (first.max_position_embeddings, second.max_position_embeddings) == (64, 128)
    assert {record.original_max_position_embeddings for record in (first, tuned, second, short)} == {32}
    assert (short.long_factor, short.max_position_embeddings) == (second.long_factor, 128)
    assert second.provenance["model"] != first.provenance["model"]
    assert report["scaling"]["long_factor"] == list(short.long_factor)


def test_the_output_is_the_tuned_model_with_the_last_factors(done: tuple[Job, dict[str, Any]]) -> None:
    job, report = done
    output = Path(report["output"])
    check_manifest(output)
    final, tuned = load(output), load(job.out / "2-tune" / "tuned")
    weights = dict(tuned.named_parameters())
    assert all((weights[name] == value).all() for name, value in final.named_parameters())
    given = dict(load(job.model).named_parameters())
    assert any((given[name] != value).any() for name, value in final.named_parameters())
    assert final.config.max_position_embeddings == 128
    assert len(list(output.glob("*.gguf"))) == 1
    card = (output / "README.md").read_text()
    assert all(name in card for name in ("before", "first", "tune", "second", "short"))
    assert "perplexity.png" in check_manifest(output)
    ((shown, file),) = re.findall(r"!\[(.*)\]\((.*)\)", card)
    assert file == "perplexity.png"
    found = dict(re.findall(r"([\w ]+) from ([\d.,]+) at 32 to", shown))
    # The given model and its closed forms, then what every stage made; not closed forms on tuned weights.
    measured = {each["stage"]: each["perplexity"] for each in report["stages"]}
    expected = measured["before"] | {
        f"after {stage}": measured[stage][stage] for stage in ("first", "tune", "second", "short")
    }
    assert {name.strip(): value for name, value in found.items()} == {
        name: perplexity_text(values["32"]) for name, values in expected.items()
    }


def test_what_is_measured_before_and_after_every_stage(done: tuple[Job, dict[str, Any]]) -> None:
    _, report = done
    stages = {stage["stage"]: stage for stage in report["stages"]}
    assert list(stages) == ["before", "first", "tune", "second", "short"]
    assert set(stages["before"]["perplexity"]) == {"unchanged", "yarn", "pi"}
    assert set(stages["second"]["perplexity"]) == {"second", "yarn", "pi"}
    assert set(stages["tune"]["perplexity"]) == {"tune"}  # other factors than those it was tuned with say nothing
    # Only up to the length that the factors were made for.
    assert set(stages["first"]["perplexity"]["first"]) == set(stages["tune"]["perplexity"]["tune"]) == {"32", "64"}
    assert set(stages["second"]["perplexity"]["second"]) == {"32", "64", "128"}
    # Closed forms after tuning stretch the tuned factors: not those of the first table.
    assert stages["second"]["perplexity"]["pi"] != stages["before"]["perplexity"]["pi"]
    # The short set is measured at the old window.
    assert stages["before"]["short"]["unchanged"] == stages["before"]["perplexity"]["unchanged"]["32"]


def _applied(job: Job, stage: str) -> dict[str, Any]:
    record = RopeScaling.from_json((job.out / stage / "longrope.json").read_text("utf-8"))
    return {**record.to_dict(), "provenance": None}


def test_denormals_are_flushed_from_the_first_measurement_on(
    tiny_folder: Path, texts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = noting(monkeypatch, measure, "load")
    stage = {"name": "tune", "factors": "yarn", "finetune": {**TUNE, "to": 64, "steps": 1}}
    run_recipe(_job(tiny_folder, texts, tmp_path / "out", _recipe([stage]), allow_lossy=True), lambda line: None)
    assert set(seen) == {True}
    assert not flushes()


def test_nothing_is_measured_twice(done: tuple[Job, dict[str, Any]]) -> None:
    """The closed forms stand after both searches and before them: 13 times measured, of which four are the same."""
    job, report = done
    assert sum(len(stage["perplexity"]) for stage in report["stages"]) == 13
    same = _applied(job, "3-second") == _applied(job, "4-short")  # recovery may find nothing better
    assert len(list((job.out / "measures").iterdir())) == 9 - same


def test_what_a_measure_depends_on_is_in_its_file_s_name(tmp_path: Path) -> None:
    measurer = Measurer(ReportPlan(("32", "64")), (), 32, 0, tmp_path, ("sum",))
    record = RopeScaling(
        rope_theta=10000.0, rotary_dim=4, original_max_position_embeddings=32, max_position_embeddings=64,
        long_factor=(1.0, 2.0),
    )  # fmt: skip
    changed = replace(record, long_factor=(1.0, 3.0))
    others = [
        measurer._file("model", [32, 64], changed),
        measurer._file("model", [32, 64], None),
        measurer._file("model", [32], record),
        measurer._file("other", [32, 64], record),
        replace(measurer, plan=ReportPlan(("32", "64"), documents=3))._file("model", [32, 64], record),
        replace(measurer, seed=1)._file("model", [32, 64], record),
        replace(measurer, sums=("other",))._file("model", [32, 64], record),
        replace(measurer, window=64)._file("model", [32, 64], record),
    ]
    first = measurer._file("model", [32, 64], record)
    assert first == measurer._file("model", [32, 64], record.with_provenance(found="elsewhere"))
    assert len({first, *others}) == 1 + len(others)


def test_finished_stages_are_not_done_again(done: tuple[Job, dict[str, Any]]) -> None:
    job, report = done
    before = {path: path.stat().st_mtime_ns for path in job.out.rglob("*") if path.is_file() and path.parent != job.out}
    lines: list[str] = []
    again = run_recipe(job, lines.append)
    assert again == report
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert sum("finished before" in line for line in lines) == 4


def test_another_option_model_or_seed_is_refused_by_name(
    done: tuple[Job, dict[str, Any]], texts: dict[str, Path]
) -> None:
    job, _ = done
    changed = [{**STAGES[0]}, {"name": "tune", "finetune": {**TUNE, "steps": 5}}, *STAGES[2:]]
    with pytest.raises(StaleStateError, match="2-tune was made with stage"):
        run_recipe(_job(job.model, texts, job.out, _recipe(changed)), lambda line: None)
    with pytest.raises(StaleStateError, match="1-first was made with seed 0, and now it is 7"):
        run_recipe(_job(job.model, texts, job.out, _recipe(), seed=7), lambda line: None)


@pytest.mark.parametrize(("role", "stage"), [("report", "0-before"), ("search", "1-first"), ("train", "2-tune")])
def test_other_texts_are_refused_by_role(
    done: tuple[Job, dict[str, Any]], texts: dict[str, Path], tmp_path: Path, role: str, stage: str
) -> None:
    job, _ = done
    moved = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in texts.items()}
    run_recipe(_job(job.model, moved, job.out, _recipe()), lambda line: None)  # the same texts elsewhere
    file = next(path for path in moved[role].rglob("*") if path.is_file())
    file.write_text(file.read_text() + "One more line.\n")
    with pytest.raises(StaleStateError, match=f"{stage} was made with {role} texts"):
        run_recipe(_job(job.model, moved, job.out, _recipe()), lambda line: None)


def test_a_changed_file_of_a_stage_is_refused(
    done: tuple[Job, dict[str, Any]], texts: dict[str, Path], tmp_path: Path
) -> None:
    job, _ = done
    out = tmp_path / "out"
    shutil.copytree(job.out, out)
    record = out / "1-first" / "longrope.json"
    record.write_text(record.read_text().replace("64", "65", 1))
    with pytest.raises(InputFileError, match="differs from"):
        run_recipe(_job(job.model, texts, out, _recipe()), lambda line: None)


def test_closed_forms_can_be_tuned_with(tiny_folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    stages = [{"name": "tune", "factors": "pi", "finetune": {**TUNE, "steps": 1, "to": "64"}}]
    job = _job(tiny_folder, texts, tmp_path / "out", {"stages": stages})
    report = run_recipe(job, lambda line: None)
    assert report["scaling"]["long_factor"] == [2.0] * 16
    assert "--to" not in report["stages"][0]["command"]


@pytest.mark.slow
def test_a_killed_recipe_is_continued_to_the_same_files(
    done: tuple[Job, dict[str, Any]], texts: dict[str, Path], tmp_path: Path
) -> None:
    job, _ = done
    path, out = tmp_path / "small.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(_recipe()))
    words = ["extend", str(job.model), "--recipe", str(path), "--out", str(out), "--no-verify"]
    words += [f"--data={role}={text}" for role, text in texts.items()]
    command = [sys.executable, "-c", "from longrope_export.cli.main import main; main()", *words]
    for wanted in (out / "1-first" / "journal.jsonl", out / "2-tune" / "tuned" / "log.jsonl"):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if wanted.exists() and wanted.read_bytes().count(b"\n") >= 2:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.002)
        assert process.wait(120) == -signal.SIGKILL
    result = CliRunner().invoke(extend, words[1:], catch_exceptions=False)
    assert result.exit_code == 0
    for name in ("1-first/longrope.json", "2-tune/tuned/model.safetensors", "4-short/longrope.json"):
        assert sha256(out / name) == sha256(job.out / name), name


def test_the_plan_names_every_stage_as_a_command(tiny_folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(_recipe()))
    words = [str(tiny_folder), "--recipe", str(path), "--out", str(tmp_path / "out"), "--dry-run"]
    result = CliRunner().invoke(extend, words, catch_exceptions=False)
    lines = result.output.splitlines()
    assert "4 stages:" in lines[0]
    assert "2. tune: finetune, 32 → 64 tokens" in lines
    assert any("4 steps of 2 rows of 64 tokens, 512 in all, learning rate 0.001" in line for line in lines)
    assert any("2-tune/tuned --data=TEXTS" in line and "--to=128" in line for line in lines)
    assert not (tmp_path / "out").exists()
    planned = json.loads(CliRunner().invoke(extend, [*words, "--json"], catch_exceptions=False).output)
    assert [(each["window"], each["target"]) for each in planned] == [(32, 64), (32, 64), (64, 128), (64, 128)]


@pytest.mark.parametrize(
    ("stages", "top", "error", "words"),
    [
        (STAGES, {"window": 4096}, RecipeError, "is for a window of 4,096 tokens, and .* has 32"),
        ([{"search": {"to": "16"}}], {}, RecipeError, "16 tokens are no longer than the 32 of given"),
        ([STAGES[0], STAGES[1], {"search": {"to": "64"}}], {}, RecipeError, "no longer than the 64 of tune"),
        (
            [STAGES[0], {"finetune": {"length": "128"}}],
            {},
            RecipeError,
            "rows of 128 tokens are longer than its factors' 64",
        ),
        ([{"factors": "yarn", "finetune": {}}], {}, RecipeError, "a closed form needs to"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_first(
    tiny_folder: Path,
    texts: dict[str, Path],
    tmp_path: Path,
    stages: list[Any],
    top: dict[str, Any],
    error: type[LongRopeError],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        plan_recipe(_job(tiny_folder, texts, tmp_path / "out", _recipe(stages, **top)))
    assert not (tmp_path / "out").exists()


def test_texts_are_asked_for_by_role(tiny_folder: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    for role in texts:
        fewer = {other: path for other, path in texts.items() if other != role}
        with pytest.raises(InputFileError, match=f"give --data {role}=PATH"):
            plan_recipe(_job(tiny_folder, fewer, tmp_path / "out", _recipe()))
    with pytest.raises(InputFileError, match="does not exist"):
        plan_recipe(_job(tiny_folder, {**texts, "train": tmp_path / "none"}, tmp_path / "out", _recipe()))
    with pytest.raises(InputFileError, match="for two roles"):
        plan_recipe(_job(tiny_folder, {**texts, "report": texts["search"]}, tmp_path / "out", _recipe()))
    result = CliRunner().invoke(extend, [str(tiny_folder), "--recipe", "demo", "--data", str(texts["train"])])
    assert "write ROLE=PATH" in result.output


@pytest.mark.parametrize(
    ("number", "options", "words"),
    [
        (
            3,
            {"recover": {**SMALL, "short": "search", "short-margin": 0, "for": "gguf", "documents": 40}},
            r"stage 4 \(.*\): the texts give .* 41 documents",
        ),
        (1, {"finetune": {**TUNE, "length": 60}, "name": "tune"}, r"stage 2 \(tune\): no document has the 60 tokens"),
    ],
)
def test_texts_too_short_for_a_later_stage_are_refused_before_the_first(
    tiny_folder: Path, texts: dict[str, Path], tmp_path: Path, number: int, options: dict[str, Any], words: str
) -> None:
    stages = [{"name": "short", **options} if place == number else stage for place, stage in enumerate(STAGES)]
    short = tmp_path / "train"
    short.mkdir()
    (short / "a.txt").write_text("the quick window of tokens")
    lines: list[str] = []
    with pytest.raises(RecipeError, match=words):
        run_recipe(
            _job(
                tiny_folder, {**texts, **({"train": short} if number == 1 else {})}, tmp_path / "out", _recipe(stages)
            ),
            lines.append,
        )
    assert not lines


def test_options_of_a_single_search_are_refused(tiny_folder: Path) -> None:
    result = CliRunner().invoke(extend, [str(tiny_folder), "--recipe", "demo", "--budget", "3"])
    assert result.exit_code == 2
    assert "--budget does not go with --recipe" in result.output
    assert "--to is missing" in CliRunner().invoke(extend, [str(tiny_folder), "--method", "yarn"]).output


def test_a_folder_that_holds_something_else_is_refused(
    tiny_folder: Path, texts: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds no recipe to continue"):
        plan_recipe(_job(tiny_folder, texts, tmp_path / "out", _recipe()))
    (tmp_path / "out" / "recipe.json").write_text('{"recipe": "other"}')
    with pytest.raises(OutputError, match="holds the recipe 'other'"):
        plan_recipe(_job(tiny_folder, texts, tmp_path / "out", _recipe()))
