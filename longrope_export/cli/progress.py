"""Progress of long work on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

SECONDS_BETWEEN_LINES = 10.0


class Report(Protocol):
    """`report(done, everything, status)`; the status is a short text beside the bar."""

    def __call__(self, done: int, everything: int, status: str = "") -> None: ...


@contextmanager
def progress(title: str, stream: TextIO | None = None) -> Iterator[Report]:
    """Yield `report(done, all, status)`, which shows how far the work called `title` is and how long it still takes."""
    out = stream or sys.stderr
    if not out.isatty():
        yield _plain_lines(title, out)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    status = TextColumn("{task.fields[status]}")
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), status)
    with Progress(*columns, console=Console(file=out), transient=True) as bar:
        task = bar.add_task(title, total=None, status="")

        def report(done: int, everything: int, status: str = "") -> None:
            bar.update(task, completed=done, total=everything, status=status)

        yield report


def _plain_lines(title: str, out: TextIO) -> Report:
    printed = started = time.monotonic()
    first, whole = 0, 0

    def report(done: int, everything: int, status: str = "") -> None:
        nonlocal printed, started, first, whole
        now = time.monotonic()
        if everything != whole:
            if whole:  # other work than before, a part of which may be done already: its rate begins here
                printed, started, first = now, now, done
            whole = everything
        if now - printed < SECONDS_BETWEEN_LINES or done <= first:
            return
        printed = now
        left = (now - started) * (everything - done) / (done - first)
        state = f"{status}, " if status else ""
        print(f"{title}: {done / everything:.0%}, {state}{left:.0f} s left", file=out, flush=True)

    return report
