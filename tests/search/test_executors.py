"""Executors: the same outcomes as in one process, workers that die, fail, and go away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner
from toy_objective import ToySource, toy_outcome

from longrope_export.cli.search import search
from longrope_export.errors import InputFileError, MissingDependencyError, RuntimeFailure
from longrope_export.search import measuring
from longrope_export.search.config import SearchConfig
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors import InProcess, Processes, RayWorkers
from longrope_export.search.executors import ray as ray_module
from longrope_export.search.executors.ray import gpu_share
from longrope_export.search.journal import Journal
from longrope_export.search.measuring import worker_threads
from longrope_export.search.protocol import SEARCH, Outcome, Pass, Trial
from longrope_export.search.space import Candidate

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
KINDS = pytest.mark.parametrize("kind", ["processes", "ray"])


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    """A local Ray with three CPUs and four GPUs that are not there, started once; its workers find the helpers."""
    import ray

    before = {name: os.environ.get(name) for name in ("PYTHONPATH", "RAY_AUTH_MODE", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(PYTHONPATH=str(HELPERS), RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0")
    # The GPUs are numbers for handing out: none is touched.
    ray.init(
        address="local", num_cpus=3, num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning"
    )
    yield
    ray.shutdown()
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[Any]:
    """`start(kind, source, workers=2)`: an executor that is closed at the end."""
    started: list[Any] = []

    def begin(kind: str, source: ToySource, workers: int = 2) -> Any:
        if kind == "ray":
            request.getfixturevalue("ray_here")
        started.append((RayWorkers if kind == "ray" else Processes)(source, workers))
        return started[-1]

    yield begin
    for executor in started:
        executor.close()


def _trials(documents: int, gradient: bool = False) -> list[Trial]:
    candidates = [Candidate((1.0, 2.0)), Candidate((1.5, 3.0))]
    return [Trial(each, SEARCH, document, gradient) for each in candidates for document in range(documents)]


def _alone(trials: list[Trial]) -> list[Pass]:
    """Each trial as a pass."""
    return [(trial,) for trial in trials]


def _in_order(executor: Any, trials: list[Trial]) -> list[Outcome]:
    found = dict(executor.run(_alone(trials)))
    return [found[index][0] for index in range(len(trials))]


def _opened(folder: Path) -> list[int]:
    """The process of every opening of the objective."""
    return [int(path.name.split("-")[1]) for path in folder.glob("opened-*")]


def _workers(folder: Path) -> set[str]:
    return {path.name.split("-")[2] for path in folder.glob("began-*")}


@KINDS
def test_outcomes_are_those_of_one_process(start: Any, tmp_path: Path, kind: str) -> None:
    trials, source = [*_trials(2), *_trials(1, gradient=True)], ToySource(tmp_path, seconds=0.02)
    with source.open() as objective:
        expected = _in_order(InProcess(objective), trials)
    executor = start(kind, source)
    assert _in_order(executor, trials) == expected
    assert _in_order(executor, trials[:1]) == expected[:1]
    assert len(set(expected)) == 6
    assert len(_opened(tmp_path)) == len(set(_opened(tmp_path)))
    assert len(_workers(tmp_path) - {str(os.getpid())}) > 0


def test_a_free_worker_gets_the_next_trial(start: Any, tmp_path: Path) -> None:
    trials = _trials(6)[:6]
    arrived = [index for index, _ in start("processes", ToySource(tmp_path, slow_first=1.0)).run(_alone(trials))]
    assert arrived[-1] == 0
    assert sorted(arrived) == list(range(6))
    assert len(_workers(tmp_path)) == 2


@KINDS
def test_a_killed_worker_s_trial_is_done_again(start: Any, tmp_path: Path, kind: str, caplog: Any) -> None:
    trials = _trials(4)[:4]
    assert _in_order(start(kind, ToySource(tmp_path, kills=2)), trials) == [toy_outcome(trial) for trial in trials]
    assert len(list(tmp_path.glob("began-2-*"))) == 2
    assert len(list(tmp_path.glob("began-*"))) == 5
    if kind == "processes":
        assert "SIGKILL" in caplog.text


@KINDS
def test_a_trial_that_kills_every_worker_is_given_up(start: Any, tmp_path: Path, kind: str) -> None:
    with pytest.raises(RuntimeFailure, match=r"document 2.*--workers") as caught:
        _in_order(start(kind, ToySource(tmp_path, kills_always=1)), _trials(2)[:2])
    assert "\n" not in str(caught.value)
    assert len(list(tmp_path.glob("began-1-*"))) == 3


@KINDS
def test_a_trial_whose_llama_cpp_dies_is_done_again(start: Any, tmp_path: Path, kind: str, caplog: Any) -> None:
    trials = _trials(3)[:3]
    executor = start(kind, ToySource(tmp_path, child_deaths=(1, 2)))
    assert _in_order(executor, trials) == [toy_outcome(trial) for trial in trials]
    assert len(list(tmp_path.glob("began-1-*"))) == 3
    assert caplog.text.count("llama.cpp died by SIGKILL on a copy of the model: no log; its pass is done again") == 2


@KINDS
def test_a_trial_that_kills_every_llama_cpp_is_given_up(start: Any, tmp_path: Path, kind: str) -> None:
    with pytest.raises(RuntimeFailure, match=r"^llama.cpp died by SIGKILL on a copy of the model: no log$"):
        _in_order(start(kind, ToySource(tmp_path, child_deaths=(1, 9))), _trials(2)[:2])
    assert len(list(tmp_path.glob("began-1-*"))) == 3


def test_errors_of_a_worker_are_one_line(start: Any, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"^document 1 is not there$"):
        _in_order(start("processes", ToySource(tmp_path, user_error=1)), _trials(2))


@KINDS
def test_a_bug_in_a_worker_is_one_line_that_says_where(start: Any, tmp_path: Path, kind: str) -> None:
    with pytest.raises(RuntimeFailure) as caught:
        _in_order(start(kind, ToySource(tmp_path, bug=1)), _trials(2))
    assert str(caught.value) == "a worker failed on document 2 of part search: ZeroDivisionError: division by zero"
    assert "toy_objective.py" in str(caught.value.__cause__)


@KINDS
def test_a_model_that_does_not_open_is_the_user_s_error(start: Any, tmp_path: Path, kind: str) -> None:
    with pytest.raises(InputFileError, match=r"^model.gguf is not there$"):
        _in_order(start(kind, ToySource(tmp_path, no_model="error")), _trials(2))


@KINDS
@pytest.mark.timeout(120)
def test_a_model_that_kills_its_workers_is_given_up(start: Any, tmp_path: Path, kind: str) -> None:
    with pytest.raises(RuntimeFailure, match=r"^3 workers (on Ray )?died while loading the model.*--workers") as caught:
        _in_order(start(kind, ToySource(tmp_path, no_model="dies"), 1), _trials(2))
    assert "\n" not in str(caught.value)


def test_a_worker_killed_while_idle_is_replaced(start: Any, tmp_path: Path) -> None:
    trials, executor = _trials(2), start("processes", ToySource(tmp_path))
    expected = [toy_outcome(trial) for trial in trials]
    assert _in_order(executor, trials) == expected
    for pid in _opened(tmp_path):
        os.kill(pid, signal.SIGKILL)
    assert _in_order(executor, trials) == expected


def test_what_an_abandoned_round_still_measures_is_dropped(start: Any, tmp_path: Path) -> None:
    trials, executor = _trials(4)[:4], start("processes", ToySource(tmp_path, seconds=0.3))
    next(executor.run(_alone(trials)))
    other = [Trial(Candidate((9.0, 9.0)), SEARCH, document) for document in range(4)]
    assert _in_order(executor, other) == [toy_outcome(trial) for trial in other]


def test_close_lets_idle_workers_finish_and_stops_busy_ones(tmp_path: Path) -> None:
    source = ToySource(tmp_path, slow_first=60.0)
    with Processes(source, 2) as executor:
        run = executor.run(_alone(_trials(2)[:2]))
        assert next(run)[0] == 1
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert len(_opened(tmp_path)) == 2
    assert len(list(tmp_path.glob("closed-*"))) == 1
    assert not any(map(_alive, _opened(tmp_path)))


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


OWNER = """
import sys
from pathlib import Path
from toy_objective import ToySource
from longrope_export.search.executors import Processes
from longrope_export.search.protocol import SEARCH, Trial
from longrope_export.search.space import Candidate
if __name__ == "__main__":
    try:
        with Processes(ToySource(Path(sys.argv[1]), seconds=60, slow_first=60), 2) as executor:
            list(executor.run([(Trial(Candidate((1.0,)), SEARCH, document),) for document in range(4)]))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_workers_leave_with_their_owner(tmp_path: Path, stop: int) -> None:
    script, folder = tmp_path / "owner.py", tmp_path / "notes"
    folder.mkdir()
    script.write_text(OWNER)
    environment = {**os.environ, "PYTHONPATH": str(HELPERS)}
    command = [sys.executable, str(script), str(folder)]
    owner = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(folder.glob("began-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    # Ctrl-C of a terminal goes to every process of the group.
    (os.killpg if stop == signal.SIGINT else os.kill)(owner.pid, stop)
    _, stderr = owner.communicate(timeout=60)
    assert owner.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert stderr == ("stopped\n" if stop == signal.SIGINT else "")
    pids = _opened(folder)
    assert len(pids) == 2
    while any(map(_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(_alive, pids))


@pytest.mark.parametrize("gpus", [False, True])
def test_ray_workers_share_the_gpus(ray_here: None, tmp_path: Path, gpus: bool) -> None:
    with RayWorkers(ToySource(tmp_path), 2, gpus=gpus) as executor:
        see = [each.__ray_call__.remote(lambda _: os.environ.get("CUDA_VISIBLE_DEVICES")) for each in executor._actors]
        seen = [set(filter(None, (found or "").split(","))) for found in executor._ray.get(see)]
    assert [len(each) for each in seen] == ([2, 2] if gpus else [0, 0])
    assert not seen[0] & seen[1]


@pytest.mark.parametrize(
    ("gpus", "workers", "share"), [(0, 2, 0), (1, 1, 1), (8, 2, 4), (5, 2, 2), (1, 3, 1 / 3), (2, 3, 0.5), (2, 4, 0.5)]
)
def test_a_worker_s_share_of_the_gpus(gpus: int, workers: int, share: float) -> None:
    assert gpu_share(gpus, workers) == share


@pytest.mark.parametrize(("workers", "threads", "room"), [(2, 4, 0), (3, 2, 1), (4, 1, 3)])
def test_workers_that_do_not_fit_are_told(
    ray_here: None, tmp_path: Path, workers: int, threads: int, room: int
) -> None:
    line = (
        rf"^the Ray cluster has room for {room} of {workers} workers with {threads} CPUs on one machine each "
        r"\(machines: 1, with 3 CPUs and 4 GPUs\): take fewer --workers or --threads$"
    )
    with pytest.raises(RuntimeFailure, match=line):
        RayWorkers(ToySource(tmp_path), workers, threads)


@pytest.mark.timeout(120)
def test_a_cluster_that_others_use_is_waited_for_and_given_up(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(ray_module, "_ROOM_TOLD", 0.5)
    with RayWorkers(ToySource(tmp_path), 1, 3) as others:
        dict(others.run(_alone(_trials(1))))
        monkeypatch.setattr(ray_module, "_ROOM", 1.0)
        with RayWorkers(ToySource(tmp_path), 2) as executor, pytest.raises(RuntimeFailure, match="no room for 2 of 2"):
            dict(executor.run(_alone(_trials(3))))
        assert "no room yet for 2 of 2 workers" in caplog.text
        monkeypatch.setattr(ray_module, "_ROOM", 50.0)
        with RayWorkers(ToySource(tmp_path), 1) as executor:
            others.close()
            assert len(dict(executor.run(_alone(_trials(3))))) == 6


def test_the_threads_are_an_even_share_of_the_cluster_s(ray_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    shares = [worker_threads(SearchConfig(executor="ray", workers=workers)) for workers in (1, 2, 3, 5)]
    assert shares == [3, 1, 1, 1]
    assert worker_threads(SearchConfig(executor="ray", threads=7)) == 7
    assert worker_threads(SearchConfig(executor="processes", workers=2)) == 8


JOINING = """
import ray
from longrope_export.search.config import SearchConfig
from longrope_export.search.measuring import worker_threads
print(worker_threads(SearchConfig(executor="ray", workers=1)), ray.is_initialized())
"""


def test_a_cluster_that_is_named_is_asked_and_left(ray_here: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address, "OMP_NUM_THREADS": "16"}
    done = subprocess.run([sys.executable, "-c", JOINING], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "3 False\n", done.stderr


def test_ctrl_c_ends_the_actors_and_leaves_the_journal_whole(
    ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    path, notes, trials, wait, waits = tmp_path / "journal.jsonl", tmp_path / "notes", _trials(6)[:6], ray.wait, []
    notes.mkdir()

    def interrupted_wait(*arguments: Any, **options: Any) -> Any:
        waits.append(arguments)
        if len(waits) == 4:
            signal.raise_signal(signal.SIGINT)
        return wait(*arguments, **options)

    with Journal(path) as journal, pytest.raises(KeyboardInterrupt), RayWorkers(ToySource(notes), 2) as executor:
        journal.begin({})
        actors = list(executor._actors)  # Ray would end those that nobody knows by itself
        monkeypatch.setattr(ray, "wait", interrupted_wait)
        Evaluator(executor, {SEARCH: 6}, journal).evaluate(trials)
    deadline = time.monotonic() + 30
    while any(map(_alive, _opened(notes))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(_opened(notes)) == len(actors) == 2
    assert not any(map(_alive, _opened(notes)))
    with Journal(path) as journal, ToySource(notes).open() as objective:
        # The first wait is for the actors' places.
        assert len(journal.entries) == 2
        outcomes = Evaluator(InProcess(objective), {SEARCH: 6}, journal).evaluate(trials)
    assert outcomes == [toy_outcome(trial) for trial in trials]
    assert len(list(notes.glob(f"began-*-{os.getpid()}-*"))) == 4


class _LosesOne(RayWorkers):
    """Real Ray workers, the first of which is killed while the first round is measured."""

    pids: ClassVar[list[int]] = []
    options: ClassVar[dict[str, Any]] = {}
    workers: ClassVar[list[int]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.options.update(options)
        super().__init__(*arguments, **options)
        self.workers.append(len(self._actors))

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        for found in super().run(passes):
            yield found
            if not self.pids:
                self.pids.append(self._first())
                os.kill(self.pids[0], signal.SIGKILL)

    def close(self) -> None:
        self.pids.append(self._first())
        super().close()

    def _first(self) -> int:
        return int(self._ray.get(self._actors[0].__ray_call__.remote(lambda _: os.getpid())))


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_the_command_on_ray_ends_in_the_same_bytes_though_a_worker_is_killed(
    ray_here: None, tiny_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "RayWorkers", _LosesOne)
    (tmp_path / "map.json").write_text('{"": "cpu"}')
    on_ray = ["--workers", "3", "--device-map", str(tmp_path / "map.json")]
    for name in ("local", "ray"):
        files = [str(tiny_folder), "--to", "4x", "--data", str(text), "--out", str(tmp_path / name)]
        options = ["--budget", "16", "--documents", "2", "--validation-documents", "2", "--documents-per-step", "2"]
        executor = ["--threads", "1", "--executor", name, *(on_ray if name == "ray" else [])]
        result = CliRunner().invoke(search, [*files, *options, *executor, "--json"], catch_exceptions=False)
        assert result.exit_code == 0
        assert json.loads(result.stdout)["complete"]
    killed, after = _LosesOne.pids
    assert not _alive(killed)
    assert killed != after
    assert _LosesOne.options == {"gpus": True}
    assert _LosesOne.workers == [3]
    assert (tmp_path / "ray" / "longrope.json").read_bytes() == (tmp_path / "local" / "longrope.json").read_bytes()


def test_a_missing_ray_is_one_line_that_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"^[^\n]*pip install 'longrope-export\[ray\]'$"):
        RayWorkers(ToySource(tmp_path), 2)
