"""An objective without a model, for tests of executors: worker processes import it by name, so it is a module."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from longrope_export.errors import InputFileError, RuntimeFailure
from longrope_export.search.protocol import Outcome, Pass, Trial


@dataclass(frozen=True)
class ToySource:
    """Losses that tell candidate and document apart. `folder` gets one file for each worker that opened it, and one
    for each trial that began; a document named in the rest behaves as it says (`child_deaths`: how often it does).
    """

    folder: Path
    seconds: float = 0.0
    slow_first: float = 0.0
    kills: int | None = None
    kills_always: int | None = None
    user_error: int | None = None
    bug: int | None = None
    child_deaths: tuple[int, int] = (-1, 0)
    no_model: str = ""

    @contextmanager
    def open(self) -> Iterator[ToyObjective]:
        if self.no_model == "error":
            raise InputFileError("model.gguf is not there")
        if self.no_model == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        _note(self.folder, f"opened-{os.getpid()}-{time.monotonic_ns()}")
        try:
            yield ToyObjective(self)
        finally:
            _note(self.folder, f"closed-{os.getpid()}")


class ToyObjective:
    """What `ToySource` says."""

    def __init__(self, source: ToySource) -> None:
        self._source = source

    def measure(self, trial: Trial) -> Outcome:
        source, document = self._source, trial.document
        _note(source.folder, f"began-{document}-{os.getpid()}-{time.monotonic_ns()}")
        times = len(list(source.folder.glob(f"began-{document}-*")))
        if document == source.kills_always or (document == source.kills and times == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if document == source.child_deaths[0] and times <= source.child_deaths[1]:
            raise RuntimeFailure("llama.cpp died by SIGKILL on a copy of the model: no log")
        if document == source.user_error:
            raise InputFileError(f"document {document} is not there")
        if document == source.bug:
            raise ZeroDivisionError("division by zero\nwith a second line")
        time.sleep(source.slow_first if document == 0 else source.seconds)
        return toy_outcome(trial)

    def measure_rows(self, trials: Pass) -> tuple[Outcome, ...]:
        return tuple(map(self.measure, trials))


def toy_outcome(trial: Trial) -> Outcome:
    """The loss of a trial, and a gradient where asked."""
    loss = sum(trial.candidate.factors) + trial.document / 7.0
    return Outcome(loss, tuple(loss / (index + 1) for index in range(3)) if trial.gradient else None)


def _note(folder: Path, name: str) -> None:
    (folder / name).touch()
