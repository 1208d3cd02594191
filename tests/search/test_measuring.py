"""`longrope search` with other executors and with llama.cpp: the same record as here, and refusals before any work."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
from click.testing import CliRunner

from longrope_export.cli.search import search
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.demo import demo_model_path
from longrope_export.errors import LongRopeError, MissingDependencyError, UnsupportedModelError
from longrope_export.search import measuring
from longrope_export.search.config import EvolutionOptions, SearchConfig
from longrope_export.search.executors import InProcess, Processes
from longrope_export.search.measuring import worker_threads
from longrope_export.search.plan import Timing
from longrope_export.search.protocol import Outcome, Pass, Trial
from longrope_export.search.run import run_search

EVOLUTION = EvolutionOptions(population=2, iterations=1, mutations=1, crossovers=1, parents=2)
SMALL: dict[str, Any] = {
    "documents": 2, "validation_documents": 2, "threads": 1, "short": "original", "baselines": ("yarn", "pi"),
}  # fmt: skip


def _config(model: Path, text: Path, out: Path, **options: Any) -> SearchConfig:
    return SearchConfig(**{"model": model, "target": "4x", "data": (text,), "out": out, **SMALL, **options})


@pytest.fixture(scope="module")
def expected(tiny_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("here") / "out"
    run_search(_config(tiny_folder, text, out, budget="12"))
    return (out / "longrope.json").read_bytes()


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """Gets every trial that this process, and none of its workers, measures."""
    noted, run = [], InProcess.run

    def noting(executor: InProcess, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        noted.extend(trial for trials in passes for trial in trials)
        return run(executor, passes)

    monkeypatch.setattr(InProcess, "run", noting)
    return noted


def test_several_processes_write_the_same_bytes_and_another_executor_goes_on(
    tiny_folder: Path, text: Path, tmp_path: Path, expected: bytes, measured_here: list[Trial]
) -> None:
    out = tmp_path / "out"
    record, journal = out / "longrope.json", out / "journal.jsonl"
    run_search(_config(tiny_folder, text, out, budget="12", executor="processes"))
    assert record.read_bytes() == expected
    assert not measured_here
    lines = journal.read_bytes().splitlines(keepends=True)
    assert any("gradient" in json.loads(line) for line in lines[1:])
    record.unlink()
    journal.write_bytes(b"".join(lines[: len(lines) // 2]))
    run_search(_config(tiny_folder, text, out, budget="12"))
    assert record.read_bytes() == expected
    # A pass that the cut went through is measured whole again, and nothing of the journal is written anew.
    again = journal.read_bytes().splitlines(keepends=True)
    assert sorted(json.loads(line)["trial"] for line in again[1:]) == list(range(len(lines) - 1))
    assert len(lines) - len(lines) // 2 <= len(measured_here) < len(lines) - 1


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    convert_to_gguf(demo_model_path(), path, dtype="f32")
    return path


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(Path(argparse.__file__).read_text())
    return path


def _llamacpp(gguf: Path, text: Path, out: Path, **options: Any) -> SearchConfig:
    options = {
        "objective": "llamacpp", "strategy": "evolution", "evolution": EVOLUTION, "target": "2x", "documents": 1,
        "validation_documents": 1, "baselines": ("yarn",), **options,
    }  # fmt: skip
    return _config(gguf, text, out, budget="4", **options)


class _LosesLlamaCpp(Processes):
    """Real workers whose llama.cpp is killed after the first outcome: a trial may meet the dead one of either worker."""

    killed: ClassVar[list[int]] = []

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        for number, found in enumerate(super().run(passes)):
            yield found
            if number == 0 and not self.killed:
                for child in [each for worker in self._workers for each in self._children(worker)]:
                    self.killed.append(child.pid)
                    child.kill()

    def _children(self, worker: Any) -> list[psutil.Process]:
        return psutil.Process(worker._process.pid).children()


def test_llama_cpp_searches_a_gguf_here_and_in_processes_though_it_is_killed(
    gguf: Path, long_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measuring, "Processes", _LosesLlamaCpp)
    here, there = tmp_path / "here", tmp_path / "there"
    result = run_search(_llamacpp(gguf, long_text, here), patch=patch_gguf)
    assert result.scaling.max_position_embeddings == 512
    assert result.scaling.provenance["library"].startswith("xllamacpp/")
    assert sorted(path.name for path in here.iterdir()) == ["journal.jsonl", "longrope.json"]
    left = there / "llamacpp-left"
    left.mkdir(parents=True)
    (there / "journal.jsonl").touch()
    run_search(_llamacpp(gguf, long_text, there, executor="processes"), patch=patch_gguf)
    assert (there / "longrope.json").read_bytes() == (here / "longrope.json").read_bytes()
    assert not left.exists()
    assert _LosesLlamaCpp.killed
    assert "llama.cpp died by SIGKILL" in caplog.text
    assert "its pass is done again" in caplog.text


def test_the_command_searches_with_llama_cpp(gguf: Path, long_text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        str(gguf), "--to", "2x", "--data", str(long_text), "--out", str(out), "--objective", "llamacpp", "--strategy",
        "evolution", "--population", "2", "--iterations", "0", "--budget", "2", "--documents", "1",
        "--validation-documents", "1", "--short", "original", "--baselines", "yarn",
    ]  # fmt: skip
    result = CliRunner().invoke(search, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (out / "longrope.json").is_file()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"strategy": "gradient"}, LongRopeError, "no gradients"),
        ({"strategy": "critical-dim"}, LongRopeError, "--optimiser cmaes"),
    ],
)
def test_what_llama_cpp_cannot_search_is_refused(
    gguf: Path, long_text: Path, tmp_path: Path, options: dict[str, Any], error: type[LongRopeError], words: str
) -> None:
    with pytest.raises(error, match=words):
        run_search(_llamacpp(gguf, long_text, tmp_path / "out", **options), patch=patch_gguf)
    assert not (tmp_path / "out").exists()


def test_llama_cpp_needs_a_gguf_and_the_patcher(tiny_folder: Path, gguf: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="a GGUF"):
        run_search(_llamacpp(tiny_folder, text, tmp_path / "out"), patch=patch_gguf)
    with pytest.raises(LongRopeError, match="patch="):
        run_search(_llamacpp(gguf, text, tmp_path / "out"))


def test_a_missing_ray_is_told_before_any_work(
    tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"longrope-export\[ray\]"):
        run_search(_config(tiny_folder, text, tmp_path / "out", executor="ray"))
    assert not (tmp_path / "out").exists()


def test_workers_share_the_cpus_unless_threads_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert worker_threads(SearchConfig()) is None
    assert worker_threads(SearchConfig(executor="processes", workers=3)) == 2
    assert worker_threads(SearchConfig(executor="processes", workers=30)) == 1
    assert worker_threads(SearchConfig(executor="processes", threads=5)) == 5


def test_a_budget_in_time_counts_the_workers_of_a_population(tiny: Any, tiny_folder: Path, text: Path) -> None:
    from longrope_export.search.factors import new_plan, search_parts

    def evaluations(**options: Any) -> int:
        config = SearchConfig(budget="100s", documents=2, strategy="evolution", short="original", **options)
        resolved = config.resolve(tiny.numbers, "hf")
        parts = search_parts(tiny.rows, tiny.numbers, resolved, None)
        return new_plan(None, tiny.numbers, resolved, parts, Timing(1.0, 3.0, 0.1, 0.3)).evaluations  # type: ignore[arg-type]

    assert evaluations(executor="processes", workers=4) > 3 * evaluations() > 0
    assert evaluations(workers=4) == evaluations()
