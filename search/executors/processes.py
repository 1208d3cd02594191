"""Passes in several processes on this machine, each with a model of its own."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing.connection import wait

from longrope_export.errors import RuntimeFailure
from longrope_export.search.executors.failure import MOST_LOSSES, Answer, Failure, opened, place, worth_another
from longrope_export.search.executors.source import ObjectiveSource
from longrope_export.search.executors.worker import LOST, READY, Worker
from longrope_export.search.protocol import Outcome, Pass

_LOG = logging.getLogger(__name__)


class Processes(AbstractContextManager["Processes"]):
    """Workers that load the model once and get the next pass when they are free.

    A worker that dies is replaced and its pass done again, as when llama.cpp dies in one; when three die over one
    pass, or three in a row before they are ready, `RuntimeFailure` is raised. Any other error of the objective is
    raised as it is. The workers leave on `close`, and when this process dies.
    """

    def __init__(self, source: ObjectiveSource, workers: int) -> None:
        self._source = source
        self._round = 0
        self._early_losses = 0
        self._workers = [Worker(source) for _ in range(workers)]

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        """(index, outcomes) of every pass, as they finish."""
        self._round += 1
        waiting, losses, missing = deque(range(len(passes))), Counter[int](), len(passes)
        while missing:
            self._hand_out(passes, waiting)
            for worker in self._heard():
                index, result = self._take(worker)
                if index is None:
                    _check_ready(result)
                elif result is None or isinstance(result, str):
                    losses[index] += 1
                    _check_losses(losses[index], f"measuring {place(passes[index])}")
                    waiting.appendleft(index)
                elif worth_another(result, index, losses):
                    waiting.appendleft(index)
                else:
                    missing -= 1
                    yield index, opened(result, passes[index])

    def close(self) -> None:
        """End every worker: at once where it is measuring."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _hand_out(self, passes: Sequence[Pass], waiting: deque[int]) -> None:
        for worker in self._workers:
            if worker.idle and waiting:
                index = waiting.popleft()
                worker.give((self._round, index), passes[index])

    def _heard(self) -> list[Worker]:
        heard = set(map(id, wait([worker.connection for worker in self._workers])))
        return [worker for worker in self._workers if id(worker.connection) in heard]

    def _take(self, worker: Worker) -> tuple[int | None, Answer | str | None]:
        """The index of the worker's pass, if it is one of this round, and what came of it; the worker is free again.

        What is left of a round that was given up is dropped.
        """
        result = worker.receive()
        (of_round, index), worker.job = worker.job or (self._round, None), None
        if result == LOST:
            self._replace(worker)
        elif result == READY:
            self._early_losses = 0
        stale = of_round != self._round
        return (None, None) if stale else (index, result)

    def _replace(self, worker: Worker) -> None:
        cause = worker.cause_of_death()
        if not worker.ready:
            self._early_losses += 1
            _check_losses(self._early_losses, "loading the model")
        _LOG.warning("a worker died %s; another one takes its place", cause)
        worker.hang_up()
        worker.end()
        self._workers[self._workers.index(worker)] = Worker(self._source)


def _check_ready(result: Answer | str | None) -> None:
    if isinstance(result, Failure):
        raise result.error("to get ready")


def _check_losses(count: int, doing: str) -> None:
    if count >= MOST_LOSSES:
        raise RuntimeFailure(
            f"{count} workers died while {doing}: most likely the memory does not hold that many models; "
            "take fewer --workers"
        )
