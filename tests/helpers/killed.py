"""Doing something in a child process that dies by SIGKILL before one of its calls."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from typing import Any


def survives(action: Callable[[], object], step: int, calls: Iterable[tuple[Any, str]]) -> bool:
    """Whether a child lived through `action`: it dies before its call number `step` to any of `calls` (owner, name)."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call: Any) -> Any:
            def run(*arguments: Any, **named: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **named)

            return run

        for owner, name in calls:
            setattr(owner, name, counted(getattr(owner, name)))
        try:
            action()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1] == 0
