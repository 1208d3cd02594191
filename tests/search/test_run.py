"""`run_search` and `longrope search`: files in, longrope.json out, killed and continued, refused early."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from flushing import flushes, noting

from longrope_export import loader
from longrope_export.cli.search import search
from longrope_export.errors import (
    InputFileError,
    LongRopeError,
    OutputError,
    ScalingError,
    StaleStateError,
    TextTooShortError,
    UnsupportedModelError,
)
from longrope_export.scaling import RopeScaling
from longrope_export.search import documents
from longrope_export.search.executors.source import ModelSource
from longrope_export.search.plan import Plan
from longrope_export.search.progress import SearchProgress
from longrope_export.search.protocol import SEARCH, Outcome, Trial
from longrope_export.search.run import SearchConfig, opened, run_search
from longrope_export.search.space import Candidate

GRADIENT = ["--budget", "30", "--documents", "2", "--validation-documents", "2", "--threads", "1"]
EVOLUTION = [
    *GRADIENT, "--strategy", "evolution", "--population", "8", "--iterations", "3", "--mutations", "4",
    "--crossovers", "4", "--parents", "4",
]  # fmt: skip


def _arguments(folder: Path, text: Path, out: Path, *more: str) -> list[str]:
    return [str(folder), "--to", "4x", "--data", str(text), "--out", str(out), *more]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from longrope_export.cli.main import main; main()", "search", *arguments]


def _run(arguments: list[str]) -> Any:
    result = CliRunner().invoke(search, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def _stop_after_lines(command: list[str], journal: Path, lines: int, stop: int) -> tuple[int, str]:
    """Start the command, send the signal once the journal holds that many lines, and give exit code and stderr."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
            process.send_signal(stop)
            break
        time.sleep(0.001)
    _, stderr = process.communicate(timeout=120)
    return process.returncode, stderr


def _check_stops(
    tiny_folder: Path,
    text: Path,
    folder: Path,
    options: list[str],
    stops: list[tuple[float, int]],
    whole: Path | None = None,
) -> None:
    """Stop one search at each share of its journal's lines, finish it, and compare with `whole`, never stopped."""
    stopped = folder / "stopped"
    if whole is None:
        whole = folder / "whole"
        assert _run(_arguments(tiny_folder, text, whole, *options)).exit_code == 0
    journal, expected = stopped / "journal.jsonl", (whole / "journal.jsonl").read_bytes()
    arguments = _arguments(tiny_folder, text, stopped, *options)
    kept = b""
    for share, stop in stops:
        lines = max(1, round(share * expected.count(b"\n")))
        code, stderr = _stop_after_lines(_command(*arguments), journal, lines, stop)
        assert code == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        assert (stopped / "longrope.json").exists() == (stop == signal.SIGINT)
        assert journal.read_bytes().startswith(kept)
        kept = journal.read_bytes()
        kept = kept[: kept.rfind(b"\n") + 1]
        assert lines <= kept.count(b"\n") < expected.count(b"\n")
        if stop == signal.SIGINT:
            assert "Traceback" not in stderr
            assert f"longrope search {tiny_folder} --to 4x" in stderr
            assert "the best so far is in" in stderr
            best = RopeScaling.from_json((stopped / "longrope.json").read_text())
            assert best.provenance["complete"] is False
            assert best.max_position_embeddings == 128
    assert _run(arguments).exit_code == 0
    assert journal.read_bytes().startswith(kept)
    assert (stopped / "longrope.json").read_bytes() == (whole / "longrope.json").read_bytes()
    assert _asked(journal.read_bytes()) == _asked(expected)


def _asked(journal: bytes) -> list[Any]:
    return [json.loads(line)["of"] for line in journal.splitlines()[1:]]


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    "options", [GRADIENT, pytest.param(EVOLUTION, marks=pytest.mark.slow)], ids=["gradient", "evolution"]
)
def test_killed_and_interrupted_it_ends_in_the_same_bytes(
    finished: tuple[Path, str], tiny_folder: Path, text: Path, tmp_path: Path, options: list[str]
) -> None:
    whole = finished[0] if options is GRADIENT else None
    _check_stops(tiny_folder, text, tmp_path, options, [(0.3, signal.SIGKILL), (0.7, signal.SIGINT)], whole)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    "options", [GRADIENT, pytest.param(EVOLUTION, marks=pytest.mark.slow)], ids=["gradient", "evolution"]
)
def test_killed_over_and_over_it_ends_in_the_same_bytes(
    tiny_folder: Path, text: Path, tmp_path: Path, options: list[str]
) -> None:
    shares = [0.0, 0.1, 0.2, 0.35, 0.5, 0.6, 0.75, 0.9]
    _check_stops(tiny_folder, text, tmp_path, options, [(share, signal.SIGKILL) for share in shares])


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("finished") / "out"
    result = _run(_arguments(tiny_folder, text, out, *GRADIENT, "--json"))
    return out, result.stdout


def test_json_is_the_record_that_was_written(finished: tuple[Path, str]) -> None:
    out, stdout = finished
    value = json.loads(stdout)
    written = RopeScaling.from_json((out / "longrope.json").read_text())
    assert RopeScaling.from_dict(value["scaling"]) == written
    assert sorted(path.name for path in out.iterdir()) == ["journal.jsonl", "longrope.json"]
    assert written.max_position_embeddings == 128
    header = json.loads((out / "journal.jsonl").read_text().splitlines()[0])
    assert header["command"] == shlex.join(["longrope", *sys.argv[1:]])  # this process' own, here


def test_progress_goes_to_stderr_and_the_result_to_stdout(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    result = _run(_arguments(tiny_folder, text, tmp_path / "out", *GRADIENT))
    assert "best perplexity" in result.stderr
    assert "% done" in result.stderr
    assert "left" in result.stderr
    assert "validation documents" in result.stdout
    assert "32 → 128 tokens" in result.stdout


def _tables(shown: str) -> dict[str, dict[str, float]]:
    """The indented numbers of a printed result by the first words of the line above them."""
    tables: dict[str, dict[str, float]] = {}
    for line in shown.splitlines():
        if line.startswith("  "):
            name, number = line.rsplit(maxsplit=1)
            tables[next(reversed(tables))][name.strip()] = float(number)
        else:
            tables[line] = {}
    return {line: table for line, table in tables.items() if table}


def test_the_printed_result_states_search_validation_and_report_texts(
    tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    arguments = _arguments(tiny_folder, text, tmp_path / "out", *GRADIENT, "--report-documents", "1")
    shown = _run(arguments).stdout
    value = json.loads(_run([*arguments, "--json"]).stdout)
    searched, validated, reported, kept = _tables(shown).items()
    for (line, table), words, name in (
        (searched, "on documents that were searched on:", "search_perplexity"),
        (validated, "on 2 validation documents", "validation_perplexity"),
        (reported, "on 1 report documents, which chose nothing", "report_perplexity"),
        (kept, "at the window", "retention"),
    ):
        assert words in line
        assert table == pytest.approx(value[name], abs=1e-3)
        assert table
    assert "no report documents" not in shown


def test_without_report_documents_the_result_says_so_and_names_the_option(
    finished: tuple[Path, str], tiny_folder: Path, text: Path
) -> None:
    shown = _run(_arguments(tiny_folder, text, finished[0], *GRADIENT)).stdout
    assert "no report documents were asked for: with --report-documents N" in shown
    assert len(_tables(shown)) == 3


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (["--seed", "1"], "configuration.seed"),
        (["--budget", "31"], "configuration.budget"),
        (["--to", "3x"], "configuration.target"),
        (["--learning-rate", "0.01"], "configuration.gradient.learning_rate"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(
    finished: tuple[Path, str], tiny_folder: Path, text: Path, change: list[str], field: str
) -> None:
    out, _ = finished
    before = (out / "journal.jsonl").read_bytes()
    with pytest.raises(StaleStateError, match=f": {field} is "):
        _run(_arguments(tiny_folder, text, out, *GRADIENT, *change))
    assert (out / "journal.jsonl").read_bytes() == before


def _config(folder: Path, text: Path, out: Path, **options: Any) -> SearchConfig:
    few = {"budget": "30", "documents": 2, "validation_documents": 2}
    return SearchConfig(**{"model": folder, "target": "4x", "data": (text,), "out": out, **few, **options})


def _edited(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    change(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"target": "1x"}, ScalingError, "from 32 to 32 tokens"),
        ({"target": "16"}, ScalingError, "from 32 to 16 tokens"),
        ({"target": "long"}, LongRopeError, "not a length"),
        ({"target": "64k"}, TextTooShortError, "text.txt"),
        ({"documents": 400}, TextTooShortError, "documents"),
        ({"data": (Path("missing.txt"),)}, InputFileError, "missing.txt"),
        ({"model": Path("missing")}, InputFileError, "missing"),
        ({"init": Path("missing.json")}, InputFileError, "missing.json"),
        ({"dtype": "int4"}, LongRopeError, "dtype"),
        ({"threads": 0}, LongRopeError, "threads"),
        ({"data": ()}, LongRopeError, "at least one text"),
        ({"budget": "0.5"}, LongRopeError, "does not pay"),
    ],
)
def test_wrong_input_is_one_error(
    tiny_folder: Path, text: Path, tmp_path: Path, options: dict[str, Any], error: type[LongRopeError], words: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(error, match=words):
        run_search(_config(tiny_folder, text, out, **options))
    assert not (out / "longrope.json").exists()


def test_an_unknown_architecture_is_refused(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    folder = _edited(tiny_folder, tmp_path / "model", lambda config: config.update(model_type="mamba"))
    with pytest.raises(UnsupportedModelError, match="mamba"):
        run_search(_config(folder, text, tmp_path / "out"))


def test_a_linear_scaling_is_searched_on_top_of(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    def linear(config: dict[str, Any]) -> None:
        config["rope_parameters"] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

    folder = _edited(tiny_folder, tmp_path / "model", linear)
    result = run_search(_config(folder, text, tmp_path / "out", short="original", threads=1))
    assert result.scaling.short_factor == (2.0,) * 16
    assert result.scaling.long_factor[-1] > 2.0


def test_texts_that_are_named_twice_or_copied_are_searched_on_once(
    finished: tuple[Path, str], tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    shutil.copy(text, tmp_path / "copy.txt")
    twice = ["--data", str(text.parent), "--data", str(tmp_path)]
    # The journal of the text alone is of the same data, and goes on.
    result = _run(_arguments(tiny_folder, text, finished[0], *twice, *GRADIENT, "--json"))
    assert json.loads(result.stdout) == json.loads(finished[1])


def test_a_folder_that_belongs_to_something_else_is_refused(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty and holds no search"):
        run_search(_config(tiny_folder, text, tmp_path / "out"))
    with pytest.raises(OutputError, match="is a file"):
        run_search(_config(tiny_folder, text, text))


@pytest.mark.parametrize(
    ("dtype", "expected", "threads"), [("auto", "float32", 2), ("bfloat16", "bfloat16", 1), ("float32", "float32", 1)]
)
def test_the_dtype_and_the_thread_count(
    tiny_folder: Path, text: Path, tmp_path: Path, dtype: str, expected: str, threads: int
) -> None:
    import torch

    before = torch.get_num_threads()
    options: dict[str, Any] = {"dtype": dtype, "threads": threads, "budget": "8", "short": "original"}
    provenance = run_search(_config(tiny_folder, text, tmp_path / "out", **options)).scaling.provenance
    assert (provenance["dtype"], provenance["threads"]) == (expected, threads)
    assert torch.get_num_threads() == before


def test_a_dry_run_prints_plan_memory_and_time_and_writes_nothing(
    tiny_folder: Path, text: Path, tmp_path: Path
) -> None:
    arguments = _arguments(tiny_folder, text, tmp_path / "out", *GRADIENT, "--dry-run")
    shown = _run(arguments).stdout
    value = json.loads(_run([*arguments, "--json"]).stdout)
    assert not (tmp_path / "out").exists()
    assert f"{value['plan']['steps']} steps" in shown
    assert "expected time" in shown
    weights = sum(path.stat().st_size for path in tiny_folder.glob("*.safetensors"))
    assert sum(value["memory"]["weights"].values()) == pytest.approx(weights, rel=0.1)
    assert value["seconds"] == pytest.approx(_seconds(value), rel=1e-9)
    assert value["seconds"] > 0.0


def _seconds(value: dict[str, Any]) -> float:
    """The time of a dry run's plan in one process: gradients, which count three passes, take what was measured."""
    plan, timing = value["plan"], value["timing"]
    gradients = plan["steps"] * plan["documents_per_step"]
    return float((plan["units"] - 3 * gradients) * timing["forward"] + gradients * timing["gradient"])


@pytest.mark.parametrize(
    ("options", "processes", "at_once"),
    [([*EVOLUTION, "--budget", "16"], 5, 4), ([*EVOLUTION, "--budget", "5s"], 5, 4), (GRADIENT, 5, 1)],
    ids=["evaluations", "time", "descent"],
)
def test_a_dry_run_counts_the_workers(
    tiny_folder: Path, text: Path, tmp_path: Path, options: list[str], processes: int, at_once: int
) -> None:
    arguments = _arguments(tiny_folder, text, tmp_path / "out", *options, "--dry-run")
    workers = ["--executor", "processes", "--workers", "4"]
    alone, value = (json.loads(_run([*arguments, *more, "--json"]).stdout) for more in ([], workers))
    assert value["seconds"] == pytest.approx(_seconds(value) / at_once, rel=1e-9)
    for device, size in alone["memory"]["weights"].items():
        assert value["memory"]["weights"][device] == processes * size
    for kind in ("evaluation", "gradient"):
        assert value["memory"][kind] == 4 * alone["memory"][kind]
    shown = _run([*arguments, *workers]).stdout
    assert "for 4 workers and this process" in shown
    assert ("4 passes at once" in shown) == (at_once == 4)


def test_a_needle_objective_from_files(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = [
        "--documents",
        "1",
        "--validation-documents",
        "1",
        "--budget",
        "14",
        "--threads",
        "1",
        "--short",
        "original",
    ]
    result = _run([str(tiny_folder), "--to", "16x", "--data", str(text), "--out", str(out), *options,
                   "--objective", "perplexity=3,needle=1", "--json"])  # fmt: skip
    value = json.loads(result.stdout)
    assert value["objective"] == "perplexity=3,needle=1"
    assert any("exp of the objective" in note for note in value["notes"])


class _Screen:
    """A text stream that says whether it is a terminal, and keeps what is written."""

    def __init__(self, terminal: bool) -> None:
        self.terminal, self.text = terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_the_best_so_far_the_count_and_the_time_left(terminal: bool) -> None:
    screen: Any = _Screen(terminal)
    with SearchProgress(screen) as progress:
        progress.plan(Plan(gradient=4.0, early_gradient=1.0, units=20.0), {SEARCH: 2}, {SEARCH: 1.0})
        for value, loss in ((1.0, 2.0), (2.0, 1.0)):
            for document in range(2):
                progress.observe(Trial(Candidate((value,)), SEARCH, document), Outcome(loss), True)
        # What a gradient takes here counts, not the three passes of a budget in evaluations.
        for part in (SEARCH, documents.early(1024)):
            progress.observe(Trial(Candidate((1.0,)), part, 0, gradient=True), Outcome(2.0, (0.0, 0.0)), True)
    assert "best perplexity 2.718" in screen.text
    assert "45% done" in screen.text
    assert "left" in screen.text


def test_the_search_command_needs_no_torch_for_its_help() -> None:
    code = "import sys; from longrope_export.cli.search import search; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_denormals_are_flushed_from_the_loading_of_the_weights_on(
    tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = noting(monkeypatch, loader, "load")
    config = SearchConfig(model=tiny_folder, data=(text,), out=tmp_path / "out", target="4x")
    with opened(config) as inputs:
        assert flushes()
        source = ModelSource(tiny_folder, "float32", inputs.numbers, {}, 1, inputs.fingerprint)
    assert not flushes()
    with source.open():
        assert flushes()
    assert seen == [True, True]
    assert not flushes()
