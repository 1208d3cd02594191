"""Which Ray a search joins or starts, and what fits on its machines: no Ray runs when these begin."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import ray
from toy_objective import ToySource, toy_outcome

from longrope_export.errors import RuntimeFailure
from longrope_export.search.config import SearchConfig
from longrope_export.search.executors import RayWorkers
from longrope_export.search.executors import ray as ray_executor
from longrope_export.search.executors.ray import even_share
from longrope_export.search.measuring import worker_threads
from longrope_export.search.protocol import SEARCH, Trial
from longrope_export.search.space import Candidate

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
TRIAL = Trial(Candidate((1.0, 2.0)), SEARCH, 0)


@pytest.mark.timeout(60)
def test_an_address_that_does_not_answer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    line = rf"^no Ray cluster answers at RAY_ADDRESS={address}: [^\n]*refused; start it, or unset RAY_ADDRESS[^\n]*$"
    with pytest.raises(RuntimeFailure, match=line):
        RayWorkers(ToySource(tmp_path), 2)
    with pytest.raises(RuntimeFailure, match=line):
        worker_threads(SearchConfig(executor="ray"))
    assert not ray.is_initialized()


def test_a_ray_that_is_started_here_is_ended_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PYTHONPATH", str(HELPERS)), ("RAY_AUTH_MODE", "disabled"), ("RAY_ADDRESS", "local")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OMP_NUM_THREADS", "10")
    assert worker_threads(SearchConfig(executor="ray", workers=2)) == 5
    with RayWorkers(ToySource(tmp_path), 1, 5) as executor:
        assert dict(executor.run([(TRIAL,)])) == {0: (toy_outcome(TRIAL),)}
        assert ray.cluster_resources()["CPU"] == 5
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("machines", "workers", "threads", "gpus", "fits"),
    [
        ([{"CPU": 2.0}, {"CPU": 2.0}], 1, 4, 0, False),
        ([{"CPU": 4.0}, {"CPU": 2.0}, {}], 3, 2, 0, True),
        ([{"CPU": 4.0}, {"CPU": 2.0}, {}], 4, 2, 0, False),
        ([{"CPU": 64.0, "GPU": 1.0}], 49, 1, 1 / 49, True),
        ([{"CPU": 64.0, "GPU": 1.0}], 50, 1, 1 / 49, False),
        ([{"CPU": 8.0, "GPU": 2.0}] * 3, 2, 1, 3, False),
        ([{"CPU": 8.0, "GPU": 2.0}] * 3, 3, 1, 2, True),
    ],
)
def test_room_is_counted_by_machine(
    machines: list[dict[str, float]], workers: int, threads: int, gpus: float, fits: bool
) -> None:
    if fits:
        ray_executor._check_room(machines, workers, threads, gpus)
        return
    with pytest.raises(RuntimeFailure, match=f"of {workers} workers"):
        ray_executor._check_room(machines, workers, threads, gpus)


@pytest.mark.parametrize(
    ("amounts", "workers", "share"),
    [([8], 3, 2), ([4, 4, 4], 2, 4), ([3, 3], 3, 1), ([16, 4], 2, 8), ([8, 4], 2, 4), ([2], 3, 0), ([], 1, 0)],
)
def test_an_even_share_is_on_one_machine(amounts: list[int], workers: int, share: int) -> None:
    assert even_share(amounts, workers) == share
