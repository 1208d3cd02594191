"""Progress of long work on stderr: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

SECONDS_BETWEEN_LINES = 10.0

Report = Callable[[int, int], None]


@contextmanager
def progress(title: str, stream: TextIO | None = None) -> Iterator[Report]:
    """Yield `report(done, all)`, which shows how far the work called `title` is and how long it still takes."""
    out = stream or sys.stderr
    if not out.isatty():
        yield _plain_lines(title, out)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=out), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, everything: bar.update(task, completed=done, total=everything)


def _plain_lines(title: str, out: TextIO) -> Report:
    started = time.monotonic()
    printed = started

    def report(done: int, everything: int) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed < SECONDS_BETWEEN_LINES or not done:
            return
        printed = now
        left = (now - started) * (everything - done) / done
        print(f"{title}: {done / everything:.0%}, {left:.0f} s left", file=out, flush=True)

    return report
