"""Progress of a search on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from longrope_export.search.documents import EARLY
from longrope_export.search.plan import Plan
from longrope_export.search.protocol import SEARCH, Outcome, Trial
from longrope_export.search.space import Candidate

_SECONDS_BETWEEN_LINES = 15.0


class SearchProgress:
    """Shows the best perplexity so far on the search documents, the share of the work that is done, and the time left.

    The best is of candidates measured on all search documents that the search has compared so far.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Progress | None = None
        self._losses: dict[Candidate, list[float]] = defaultdict(list)
        self._units: Mapping[str, float] = {}
        self._plan = Plan()
        self._compared = 1
        self._total, self._done, self._measured = 0.0, 0.0, 0.0
        self._best = math.inf
        self._started, self._printed = time.monotonic(), -math.inf

    def __enter__(self) -> SearchProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self._total:
            self._line()

    def plan(self, plan: Plan, sizes: Mapping[str, int], units: Mapping[str, float]) -> None:
        """Begin: the plan's units are the whole."""
        self._plan, self._units, self._total = plan, units, max(plan.units, 1.0)
        self._compared = plan.baseline_documents or sizes[SEARCH]
        self._started = time.monotonic()
        if self._stream.isatty():
            self._bar = Progress(
                TextColumn("searching"), BarColumn(), TextColumn("{task.fields[status]}"),
                console=Console(file=self._stream),
            )  # fmt: skip
            self._task = self._bar.add_task("search", total=self._total, status="")
            self._bar.start()

    def observe(self, trial: Trial, outcome: Outcome, measured_now: bool) -> None:
        """Count one outcome and show the state."""
        units = self._cost(trial)
        self._done += units
        self._measured += units if measured_now else 0.0
        if trial.part == SEARCH and not trial.gradient:
            losses = self._losses[trial.candidate]
            losses.append(outcome.loss)
            if len(losses) == self._compared:
                self._best = min(self._best, math.fsum(losses) / len(losses))
        self._show()

    def _cost(self, trial: Trial) -> float:
        """In the plan's units."""
        if trial.gradient and trial.part.startswith(EARLY):
            return self._plan.early_gradient
        return self._units[trial.part] * (self._plan.gradient if trial.gradient else 1.0)

    def _show(self) -> None:
        if self._bar:
            self._bar.update(self._task, completed=min(self._done, self._total), status=self._status())
        elif time.monotonic() - self._printed >= _SECONDS_BETWEEN_LINES:
            self._line()

    def _line(self) -> None:
        self._printed = time.monotonic()
        print(f"searching: {self._status()}", file=self._stream, flush=True)

    def _status(self) -> str:
        best = f"best perplexity {math.exp(self._best):.3f}, " if math.isfinite(self._best) else ""
        return f"{best}{min(self._done / self._total, 1.0):.0%} done{self._left()}"

    def _left(self) -> str:
        if not self._measured:
            return ""
        rate = (time.monotonic() - self._started) / self._measured
        seconds = max(0.0, self._total - self._done) * rate
        return f", {duration(seconds)} left"


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s" if minutes else f"{rest}s"
