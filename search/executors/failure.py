"""What went wrong in a worker, carried to the process that asked and raised there as one clear line."""

from __future__ import annotations

import logging
import traceback
from collections import Counter
from dataclasses import dataclass

from longrope_export import errors
from longrope_export.errors import LongRopeError, RuntimeFailure
from longrope_export.search.protocol import Objective, Outcome, Pass, measured

_LOG = logging.getLogger(__name__)
# A pass that loses its worker, or llama.cpp in its worker, this often is given up: it is the pass that kills them.
MOST_LOSSES = 3


@dataclass(frozen=True)
class Failure:
    """An exception of a worker: its class's name, its message, its traceback."""

    kind: str
    message: str
    trace: str

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The failure that stands for `error`."""
        return cls(type(error).__name__, str(error), "".join(traceback.format_exception(error)))

    def error(self, doing: str) -> LongRopeError:
        """A user's error as it was raised; a bug as a `RuntimeFailure` of one line, with the traceback as its cause."""
        known = getattr(errors, self.kind, None)
        if isinstance(known, type) and issubclass(known, LongRopeError):
            return known(self.message)
        summary = self.message.strip().splitlines()
        failure = RuntimeFailure(f"a worker failed {doing}: {self.kind}: {summary[0] if summary else 'no message'}")
        failure.__cause__ = RuntimeError(self.trace)
        return failure


Answer = tuple[Outcome, ...] | Failure


def answer(objective: Objective, trials: Pass) -> Answer:
    """The outcomes of a pass, or what went wrong: nothing is raised in a worker."""
    try:
        return measured(objective, trials)
    except Exception as error:
        return Failure.of(error)


def place(trials: Pass) -> str:
    """The document of a pass, for messages."""
    return f"document {trials[0].document + 1} of part {trials[0].part}"


def opened(result: Answer, trials: Pass) -> tuple[Outcome, ...]:
    """The outcomes; raises the error of a failure."""
    if isinstance(result, Failure):
        raise result.error(f"on {place(trials)}")
    return result


def worth_another(result: Answer, index: int, losses: Counter[int]) -> bool:
    """Whether pass `index` is to be done again, because llama.cpp, a child of the worker, was lost; counts that.

    Of `RuntimeFailure`s only: what llama.cpp refuses for want of memory is one too, and may have room the next time.
    """
    if not isinstance(result, Failure) or result.kind != RuntimeFailure.__name__:
        return False
    losses[index] += 1
    if losses[index] >= MOST_LOSSES:
        return False
    _LOG.warning("%s; its pass is done again", result.message)
    return True
