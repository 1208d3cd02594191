"""Trials on Ray: a cluster that runs already, or one on this machine."""

from __future__ import annotations

import importlib.util
import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from longrope_export.errors import MissingDependencyError, RuntimeFailure
from longrope_export.search.executors.failure import Failure, answer, opened
from longrope_export.search.executors.source import ObjectiveSource
from longrope_export.search.protocol import Objective, Outcome, Trial

# Ray does a trial again on a new worker this often.
_RETRIES = 2


class RayWorkers(AbstractContextManager["RayWorkers"]):
    """Ray actors that load the model once and get the next trial when they are free.

    Uses the Ray that this program is connected to, else the cluster that `RAY_ADDRESS` or `ray start` names, else
    starts one here, which `close` ends. With `gpus` the workers share the cluster's free GPUs evenly, and each sees its
    own ones alone. A lost actor is started again by Ray and its trial done again; `RuntimeFailure`
    when that fails three times. An error of the objective is raised as it is.

    Raises `MissingDependencyError` without Ray.
    """

    def __init__(self, source: ObjectiveSource, workers: int, threads: int = 1, *, gpus: bool = False) -> None:
        self._ray = _import_ray()
        self._own = _connect(self._ray, workers * threads)
        actor = self._ray.remote(RayWorker)
        share = gpu_share(int(self._ray.available_resources().get("GPU", 0)), workers) if gpus else 0
        options = {"num_cpus": threads, "num_gpus": share, "max_restarts": -1, "max_task_retries": _RETRIES}
        self._actors = [actor.options(**options).remote(source) for _ in range(workers)]

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Outcome]]:
        """(index, outcome) of every trial, as they finish."""
        waiting, free = deque(range(len(trials))), list(self._actors)
        running: dict[Any, tuple[int, Any]] = {}
        while waiting or running:
            while waiting and free:
                index, actor = waiting.popleft(), free.pop()
                running[actor.measure.remote(trials[index])] = index, actor
            for reference in self._ray.wait(list(running), num_returns=1)[0]:
                index, actor = running.pop(reference)
                free.append(actor)
                yield index, opened(self._result(reference, trials[index]), trials[index])

    def close(self) -> None:
        """End the actors, and Ray where it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._own:
            self._ray.shutdown()

    def _result(self, reference: Any, trial: Trial) -> Outcome | Failure:
        try:
            result: Outcome | Failure = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[0]
            raise RuntimeFailure(
                f"Ray lost the worker of document {trial.document + 1} of part {trial.part} {_RETRIES + 1} times "
                f"({reason}): most likely its memory does not hold the models; take fewer --workers"
            ) from error
        return result


class RayWorker:
    """The actor: opens the objective when it starts, and answers trials."""

    def __init__(self, source: ObjectiveSource) -> None:
        self._stack = ExitStack()
        self._objective: Objective | Failure
        # An actor whose constructor raises is a long story on the other side; the first answer tells it in one line.
        try:
            self._objective = self._stack.enter_context(source.open())
        except Exception as error:
            self._objective = Failure.of(error)

    def measure(self, trial: Trial) -> Outcome | Failure:
        """The outcome of a trial, or what went wrong."""
        if isinstance(self._objective, Failure):
            return self._objective
        return answer(self._objective, trial)


def gpu_share(gpus: int, workers: int) -> float:
    """GPUs of each worker: a whole number where there are enough, else the same part of one for all."""
    return gpus // workers if gpus >= workers or not gpus else 1.0 / math.ceil(workers / gpus)


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
    """Connect to Ray; whether it was started here and is ours to end."""
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "warning"}
    try:
        try:
            ray.init(address="auto", **quiet)
        except ConnectionError:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)
    except Exception as error:
        ray.shutdown()
        reason = str(error).strip().splitlines()[0]
        raise RuntimeFailure(f"Ray did not start: {reason}; try again, or --executor processes") from error
    return True
