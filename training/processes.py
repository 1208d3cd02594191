"""The processes of one run, under torchrun or `accelerate launch`: what the first one does for all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

from longrope_export.errors import LongRopeError


class SharedError(LongRopeError):
    """What the first process has found, in the others."""


def is_main() -> bool:
    """Whether this is the first process (or the only one), before anything distributed has begun."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parts_of_a_row() -> int:
    """Over how many processes each row is divided: accelerate's context parallelism, 1 without it."""
    asked = os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true"
    return int(os.environ.get("PARALLELISM_CONFIG_CP_SIZE", "1")) if asked else 1


def first_on_main(work: Callable[[], None]) -> None:
    """Do `work` in the first process while the others wait, however long it takes.

    Its `LongRopeError` is raised in all of them, in the others as `SharedError`. Needs torch.distributed to be set up where
    there are several.
    """
    from torch import distributed

    if not is_distributed():
        work()
        return
    # A group of its own: tokenising may take longer than the others' collectives may.
    group = distributed.new_group(backend="gloo", timeout=timedelta(days=2))
    outcome: list[str | None] = [None]
    error: LongRopeError | None = None
    if is_main():
        try:
            work()
        except LongRopeError as found:
            error, outcome[0] = found, str(found)
    distributed.broadcast_object_list(outcome, src=0, group=group)
    distributed.destroy_process_group(group)
    if error is not None:
        raise error
    if outcome[0] is not None:
        raise SharedError(outcome[0])


def any_of_all(flag: bool) -> bool:
    """Whether `flag` is true in any process; every process must ask."""
    import torch
    from torch import distributed

    if not is_distributed():
        return flag
    value = torch.tensor([int(flag)], device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
    return bool(value.item())


def is_distributed() -> bool:
    """Whether the processes are connected by now."""
    from torch import distributed

    return process_count() > 1 and distributed.is_available() and distributed.is_initialized()


def wait_for_all() -> None:
    """Return when every process has come here."""
    from torch import distributed

    if is_distributed():
        distributed.barrier()
