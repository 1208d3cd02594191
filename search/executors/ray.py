"""Passes on Ray: a cluster that runs already, or one on this machine."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from longrope_export.errors import MissingDependencyError, RuntimeFailure
from longrope_export.search.executors.failure import MOST_LOSSES, Answer, Failure, answer, opened, place, worth_another
from longrope_export.search.executors.source import ObjectiveSource
from longrope_export.search.protocol import Objective, Outcome, Pass

_LOG = logging.getLogger(__name__)
_QUIET = {"log_to_driver": False, "logging_level": "warning"}
# Seconds for a port to answer; then for a busy cluster to have room, before that is told and before it is given up.
_ANSWER, _ROOM_TOLD, _ROOM = 10.0, 60.0, 900.0


class RayWorkers(AbstractContextManager["RayWorkers"]):
    """Ray actors that load the model once and get the next pass when they are free.

    Uses the Ray that this program is connected to, else the cluster that `RAY_ADDRESS` or `ray start` names, else
    starts one here, which `close` ends. With `gpus` the workers share the cluster's free GPUs evenly, and each sees its
    own ones alone. A lost actor is started again by Ray and its pass done again, as when llama.cpp dies in one;
    `RuntimeFailure` when that fails three times, when three die while loading the model, when the cluster has no room
    for the workers, or does not answer. Any other error of the objective is raised as it is.

    Raises `MissingDependencyError` without Ray.
    """

    def __init__(self, source: ObjectiveSource, workers: int, threads: int = 1, *, gpus: bool = False) -> None:
        self._ray = _import_ray()
        self._actors: list[Any] = []
        self._placed: list[Any] = []
        self._loaded: list[Any] = []
        self._own = _connect(self._ray, workers * threads)
        try:
            share = _free_gpu_share(self._ray, workers) if gpus else 0
            _check_room(_machines(self._ray), workers, threads, share)
            self._start(source, workers, {"num_cpus": threads, "num_gpus": share})
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        """(index, outcomes) of every pass, as they finish."""
        self._wait_for_models()
        waiting, free, losses = deque(range(len(passes))), list(self._actors), Counter[int]()
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            while waiting and free:
                index, actor = waiting.popleft(), free.pop()
                running[actor.measure.remote(passes[index])] = index, actor
            for reference in self._ray.wait(list(running), num_returns=1)[0]:
                index, actor = running.pop(reference)
                free.append(actor)
                result = self._result(reference, f"measuring {place(passes[index])}")
                if worth_another(result, index, losses):
                    waiting.appendleft(index)
                else:
                    yield index, opened(result, passes[index])

    def close(self) -> None:
        """End the actors, and Ray where it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._own:
            self._ray.shutdown()

    def _start(self, source: ObjectiveSource, workers: int, resources: Mapping[str, float]) -> None:
        # Starting an actor again costs nothing and never fails by the model, which is loaded by a call: calls are counted.
        options = {**resources, "max_restarts": -1, "max_task_retries": MOST_LOSSES - 1}
        actor = self._ray.remote(RayWorker).options(**options)
        for _ in range(workers):
            self._actors.append(actor.remote(source))
        self._placed = [each.__ray_ready__.remote() for each in self._actors]
        self._loaded = [each.load.remote() for each in self._actors]

    def _wait_for_models(self) -> None:
        """Wait until every actor has its place and its model, once."""
        count, missing = len(self._placed), self._absent(self._placed, _ROOM_TOLD)
        if missing:
            _LOG.warning("Ray has no room yet for %d of %d workers, others use it: waiting", len(missing), count)
        if missing := self._absent(missing, _ROOM - _ROOM_TOLD):
            raise RuntimeFailure(
                f"Ray found no room for {len(missing)} of {count} workers in {_ROOM / 60.0:g} minutes: others use it; "
                "try again later, or take fewer --workers or --threads"
            )
        for reference in self._loaded:
            result = self._result(reference, "loading the model")
            if isinstance(result, Failure):
                raise result.error("to get ready")
        self._placed, self._loaded = [], []

    def _absent(self, references: Sequence[Any], seconds: float) -> list[Any]:
        if not references:
            return []
        absent: list[Any] = self._ray.wait(references, num_returns=len(references), timeout=seconds)[1]
        return absent

    def _result(self, reference: Any, doing: str) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            raise RuntimeFailure(
                f"{MOST_LOSSES} workers on Ray died while {doing} ({_first_line(error)}): most likely the memory does not "
                "hold that many models; take fewer --workers"
            ) from error


class RayWorker:
    """The actor: opens the objective when it is first asked to, also after Ray started it again, and answers passes."""

    def __init__(self, source: ObjectiveSource) -> None:
        self._source = source
        self._stack = ExitStack()
        self._objective: Objective | Failure | None = None

    def load(self) -> Failure | None:
        """Open the objective; what went wrong, if something did."""
        found = self._opened()
        return found if isinstance(found, Failure) else None

    def measure(self, trials: Pass) -> Answer:
        """The outcomes of a pass, or what went wrong."""
        found = self._opened()
        return found if isinstance(found, Failure) else answer(found, trials)

    def _opened(self) -> Objective | Failure:
        if self._objective is None:
            try:
                self._objective = self._stack.enter_context(self._source.open())
            except Exception as error:
                self._objective = Failure.of(error)
        return self._objective


def cluster_threads(workers: int) -> int | None:
    """CPU threads of each of the `workers` that share the running Ray cluster evenly; None where none runs.

    Connects for as long as it looks. Raises `RuntimeFailure` when the cluster that `RAY_ADDRESS` names does not answer.
    """
    ray = _import_ray()
    joined = not ray.is_initialized()
    if joined and not _join(ray):
        return None
    try:
        return max(1, even_share([int(machine.get("CPU", 0)) for machine in _machines(ray)], workers))
    finally:
        if joined:
            ray.shutdown()


def even_share(amounts: Sequence[int], workers: int) -> int:
    """The most that each worker can have of machines with these amounts, each on one machine; 0 if it is not one."""
    shares = range(1, max(amounts, default=0) + 1)
    return max((share for share in shares if sum(each // share for each in amounts) >= workers), default=0)


def gpu_share(gpus: int, workers: int) -> float:
    """GPUs of each worker: a whole number where there are enough, else the same part of one for all."""
    return gpus // workers if gpus >= workers or not gpus else 1.0 / math.ceil(workers / gpus)


def _free_gpu_share(ray: Any, workers: int) -> float:
    share = gpu_share(int(ray.available_resources().get("GPU", 0)), workers)
    on_machines = even_share([int(machine.get("GPU", 0)) for machine in _machines(ray)], workers)
    return min(share, on_machines) if share >= 1 else share


def _machines(ray: Any) -> list[Mapping[str, float]]:
    """What each machine of the cluster has in all, by Ray's names."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _check_room(machines: Sequence[Mapping[str, float]], workers: int, threads: int, gpus: float) -> None:
    """Raise `RuntimeFailure` when the cluster cannot hold the workers even if nothing else runs on it."""
    room = sum(_places(machine, threads, gpus) for machine in machines)
    if room >= workers:
        return
    wanted = f"{threads} CPUs" + (f" and {gpus:.3g} GPUs" if gpus else "")
    present = " and ".join(f"{sum(each.get(name, 0) for each in machines):g} {name}s" for name in ("CPU", "GPU"))
    raise RuntimeFailure(
        f"the Ray cluster has room for {room} of {workers} workers with {wanted} on one machine each (machines: "
        f"{len(machines)}, with {present}): take fewer --workers or --threads"
    )


def _places(machine: Mapping[str, float], threads: int, gpus: float) -> int:
    by_cpu = int(machine.get("CPU", 0)) // threads
    # A part of a GPU is one over a whole number, which division may just miss.
    return min(by_cpu, int(machine.get("GPU", 0) / gpus + 1e-6)) if gpus else by_cpu


def check_ray() -> None:
    """Raise `MissingDependencyError` unless Ray is installed."""
    try:
        found = importlib.util.find_spec("ray") is not None
    except ValueError:  # a module set to None: blocked
        found = False
    if not found:
        raise MissingDependencyError("--executor ray needs Ray: pip install 'longrope-export[ray]'")


def _import_ray() -> Any:
    check_ray()
    # Nobody who searches factors here asked for reports to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


def _connect(ray: Any, cpus: int) -> bool:
    """Connect to Ray; whether that was done here and is ours to end."""
    if ray.is_initialized():
        return False
    if not _join(ray):
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **_QUIET)
        except Exception as error:
            ray.shutdown()
            raise RuntimeFailure(
                f"Ray did not start: {_first_line(error)}; try again, or --executor processes"
            ) from error
    return True


def _join(ray: Any) -> bool:
    """Connect to the cluster that runs already; False where none is named and none is found.

    Raises `RuntimeFailure` when the one that `RAY_ADDRESS` names does not answer.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    if address == "local":
        return False
    named = address not in ("", "auto")
    try:
        if named:
            _check_answer(address)
        ray.init(address="auto", **_QUIET)
    except Exception as error:
        ray.shutdown()
        if isinstance(error, ConnectionError) and not named:
            return False
        where = f"no Ray cluster answers at RAY_ADDRESS={address}" if named else "Ray was found and not reached"
        raise RuntimeFailure(
            f"{where}: {_first_line(error)}; start it, or unset RAY_ADDRESS for a Ray on this machine"
        ) from error
    return True


def _check_answer(address: str) -> None:
    """Raise `OSError` unless something listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER).close()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
