"""One worker process: what runs in it, and the handle that its owner holds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import parent_process

from longrope_export.runtimes.llamacpp import cause_of_death
from longrope_export.search.executors.failure import Answer, Failure, answer
from longrope_export.search.executors.source import ObjectiveSource
from longrope_export.search.protocol import Pass

READY = "ready"
LOST = "lost"
_PATIENCE = 5.0  # seconds for a worker to leave by itself


class Worker:
    """A process with an objective of its own; at most one pass is with it.

    `job` is (round, index) of that pass. Nothing but `receive` and `end` waits.
    """

    def __init__(self, source: ObjectiveSource) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.job: tuple[int, int] | None = None
        self.ready = False
        self._process = context.Process(target=serve, args=(theirs, source), daemon=True)
        with _interrupts_held_back():
            self._process.start()
        # The other end stays open in the worker alone, so that its death reads as the end of the pipe here.
        theirs.close()

    @property
    def idle(self) -> bool:
        """Whether it can be given a pass."""
        return self.ready and self.job is None

    def give(self, job: tuple[int, int], trials: Pass) -> None:
        """Send a pass; a worker that is gone shows when its answer is read."""
        self.job = job
        with suppress(OSError):
            self.connection.send(trials)

    def receive(self) -> Answer | str:
        """The answer, or `READY`, or `LOST`; the job stays until it is looked at and set to None."""
        try:
            result: Answer | str = self.connection.recv()
        except (EOFError, OSError):
            return LOST
        self.ready = self.ready or result == READY
        return result

    def cause_of_death(self) -> str:
        """How the process ended: `by SIGKILL`, `with exit code 3`."""
        self._process.join(_PATIENCE)
        return cause_of_death(self._process.exitcode or 0)

    def hang_up(self) -> None:
        """Ask it to leave, without waiting: at once if it is measuring or loading."""
        if not self.idle:
            self._process.terminate()
        self.connection.close()

    def end(self) -> None:
        """Wait until it is gone, and make sure of that."""
        self._process.join(_PATIENCE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()


def serve(connection: Connection, source: ObjectiveSource) -> None:
    """The worker's life: open the objective, answer passes until the pipe ends."""
    # Ctrl-C reaches the whole group of processes; the one that owns the workers decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        try:
            with source.open() as objective:
                connection.send(READY)
                while True:
                    connection.send(answer(objective, connection.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:
            connection.send(Failure.of(error))


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Processes started inside begin with SIGINT blocked: one that is still importing would print a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
