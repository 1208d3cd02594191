"""How a worker gets its objective: a source is pickled, sent to the worker, and opened there once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longrope_export.errors import StaleStateError
from longrope_export.search.protocol import Objective
from longrope_export.search.space import RopeNumbers

if TYPE_CHECKING:
    from longrope_export.search.documents import Parts


class ObjectiveSource(Protocol):
    """Makes the objective in the process that needs it; holds paths and numbers, never a model."""

    def open(self) -> AbstractContextManager[Objective]: ...


@dataclass(frozen=True)
class ModelSource:
    """A model folder or GGUF file that every worker loads for itself, with `threads` CPU threads each.

    `fingerprint` is that of the model the search was begun with: another file under the same path on another machine
    raises `StaleStateError`. `placement` is that of `placement_options`.
    """

    path: Path
    dtype: str
    numbers: RopeNumbers
    documents: Parts
    threads: int
    fingerprint: str
    placement: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[Objective]:
        """The objective on the model, loaded here."""
        import torch

        from longrope_export.denormals import flushed_denormals
        from longrope_export.fingerprint import fingerprint
        from longrope_export.loader import load
        from longrope_export.search.objective import ModelObjective

        if fingerprint(self.path) != self.fingerprint:
            raise StaleStateError(f"{self.path} is another model here than where the search runs; copy the right one")
        torch.set_num_threads(self.threads)
        with flushed_denormals():
            model = load(self.path, dtype=getattr(torch, self.dtype), **self.placement)
            objective = ModelObjective(model, self.numbers, self.documents)
            try:
                yield objective
            finally:
                objective.close()
