"""The tasks of `longrope eval --tasks …`: a name, and the module that holds it as `TASK`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module

from longrope_export.errors import LongRopeError
from longrope_export.evaluation.protocol import Task, TaskOption

_TASKS = "longrope_export.evaluation.tasks"
REGISTRY = {
    "perplexity": f"{_TASKS}.perplexity",
    "sliding": f"{_TASKS}.sliding",
    "retention": f"{_TASKS}.retention",
    "longppl": f"{_TASKS}.longppl",
    "passkey": f"{_TASKS}.passkey",
    "needle": f"{_TASKS}.needle",
    "needle-perplexity": f"{_TASKS}.needle_perplexity",
    "ruler": f"{_TASKS}.ruler.task",
}
# Tasks that take an argument after a colon, as in `lm-eval:arc_easy`: the module's `task(argument)` gives the task.
WITH_ARGUMENT: dict[str, str] = {"lm-eval": f"{_TASKS}.harness"}


def load_task(name: str) -> Task:
    """The task called `name` (or `name:argument`); raises `LongRopeError` for an unknown one."""
    head, colon, argument = name.partition(":")
    if colon and head in WITH_ARGUMENT and argument:
        task: Task = import_module(WITH_ARGUMENT[head]).task(argument)
        return task
    if colon or head not in REGISTRY:
        known = [*REGISTRY, *(f"{entry}:NAME" for entry in WITH_ARGUMENT)]
        raise LongRopeError(f"there is no task {name!r}; choose from {', '.join(known)}")
    found: Task = import_module(REGISTRY[head]).TASK
    return found


def load_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks called `names`, in that order."""
    return tuple(load_task(name) for name in names)


def task_options() -> Iterator[tuple[str, TaskOption]]:
    """Every option with its task's name; a module of `WITH_ARGUMENT` has them as `OPTIONS`."""
    for name in REGISTRY:
        yield from ((name, option) for option in load_task(name).options)
    for name, module in WITH_ARGUMENT.items():
        yield from ((name, option) for option in import_module(module).OPTIONS)
