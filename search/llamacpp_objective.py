"""The loss of a candidate on a document as llama.cpp computes it, for a model that is only there as a GGUF.

A temporary copy of the file carries the factors. For each candidate a few hundred bytes of it are rewritten: the values
of both factor tensors and of the attention factor. llama.cpp then loads it and scores the text in a fresh context.
"""

from __future__ import annotations

import math
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longrope_export.errors import InputFileError, RuntimeFailure, ScalingError, UnsupportedModelError
from longrope_export.fingerprint import fingerprint
from longrope_export.formats.gguf_header import FLOAT32, GgufHeader, read_gguf_header
from longrope_export.formats.gguf_scaling import LONG_TENSOR, SHORT_TENSOR
from longrope_export.runtimes.llamacpp import default_threads
from longrope_export.runtimes.llamacpp_library import library_path
from longrope_export.runtimes.llamacpp_scorer import LlamaCppScorer
from longrope_export.scaling import RopeScaling
from longrope_export.search.mixture import Document, Piece
from longrope_export.search.protocol import Outcome, Trial
from longrope_export.search.space import Candidate, RopeNumbers

# Writes a copy of a GGUF with a record in it: `converters.gguf.patch.patch_gguf`, given by whoever may import it.
Patcher = Callable[[Path, Path, RopeScaling], object]


class FactorSlots:
    """Where the factors and the attention factor of a patched GGUF stand, and how they are rewritten in place.

    Raises `InputFileError` for a file without both tensors of `pairs` values and the attention factor's key.
    """

    def __init__(self, gguf: Path, pairs: int) -> None:
        header = read_gguf_header(gguf)
        self._path, self._pairs = gguf, pairs
        self._factors = [_tensor_position(header, name, pairs) for name in (LONG_TENSOR, SHORT_TENSOR)]
        self._attention = _attention_position(header)

    def write(self, factors: Sequence[float], attention_factor: float) -> None:
        """Put these factors into both tensors, so that they apply in every context, and the attention factor."""
        if len(factors) != self._pairs:
            raise ScalingError(f"{len(factors)} factors for {self._pairs} pairs")
        with self._path.open("r+b") as file:
            for position in self._factors:
                file.seek(position)
                file.write(struct.pack(f"<{self._pairs}f", *factors))
            file.seek(self._attention)
            file.write(struct.pack("<f", attention_factor))


def _tensor_position(header: GgufHeader, name: str, pairs: int) -> int:
    info = header.tensor(name)
    if info is None or info.size != 4 * pairs:
        raise InputFileError(f"{header.path} holds no tensor {name} of {pairs} float32 values; patch it first")
    return header.data_start + info.offset


def _attention_position(header: GgufHeader) -> int:
    entry = header.metadata.get(f"{header.get('general.architecture')}.rope.scaling.attn_factor")
    if entry is None or entry.value_type != FLOAT32:
        raise InputFileError(f"{header.path} holds no float32 attention factor; patch it first")
    return entry.end - 4


class LlamaCppObjective:
    """Weighted cross entropy of each document's tokens under a candidate, by llama.cpp in a child process.

    `gguf` is a patched copy that is written to. Everything but the factors is as llama.cpp runs the file by default.
    Raises `RuntimeFailure` when llama.cpp refuses the file or dies, `UnsupportedModelError` for a gradient,
    `ScalingError` for start tokens, `MissingDependencyError` without a llama.cpp.
    """

    def __init__(
        self, gguf: Path, numbers: RopeNumbers, documents: Mapping[str, Sequence[Document]], threads: int | None = None
    ) -> None:
        library_path()
        self._gguf, self._numbers, self._documents = gguf, numbers, documents
        self._slots = FactorSlots(gguf, numbers.pairs)
        self.threads = threads or default_threads()
        self._applied: Candidate | None = None
        self._unchanged: dict[int, float] = {}
        self._child: LlamaCppScorer | None = None

    def measure(self, trial: Trial) -> Outcome:
        """The outcome of one trial."""
        if trial.gradient:
            raise UnsupportedModelError("llama.cpp gives no gradients: take --strategy evolution or cmaes")
        pieces = self._documents[trial.part][trial.document]
        total = math.fsum(self._piece_loss(trial.candidate, piece) for piece in pieces)
        return Outcome(total if math.isfinite(total) else math.inf)

    def measure_prefix(self, candidate: Candidate, part: str, length: int, *, gradient: bool) -> None:
        """Score the first `length` tokens of the part's first document: for measuring time."""
        piece = self._documents[part][0][0]
        self._loss(candidate, Piece(piece.token_ids[:length], piece.weights[: length - 1]))

    def close(self) -> None:
        """End the child process."""
        if self._child:
            self._child.close()
        self._child, self._applied = None, None

    def _piece_loss(self, candidate: Candidate, piece: Piece) -> float:
        loss = self._loss(candidate, piece)
        if not piece.penalty:
            return loss
        if id(piece) not in self._unchanged:
            self._unchanged[id(piece)] = self._loss(self._numbers.short_original(), piece)
        above = loss - self._unchanged[id(piece)]
        return above if not above <= 0.0 else 0.0

    def _loss(self, candidate: Candidate, piece: Piece) -> float:
        changed = self._apply(candidate)
        places = np.flatnonzero(piece.weights)
        self._child = self._child or LlamaCppScorer(self._gguf, self.threads, "a copy of the model")
        try:
            losses = self._child.losses(piece.token_ids, places, len(piece.token_ids), changed=changed)
        except RuntimeFailure:
            self.close()
            raise
        return math.fsum((losses * piece.weights[places]).tolist())

    def _apply(self, candidate: Candidate) -> bool:
        """Rewrite the copy unless it holds the candidate; whether llama.cpp must load it again."""
        if candidate == self._applied:
            return False
        if candidate.start_tokens:
            raise ScalingError("llama.cpp cannot leave the first tokens as they are: leave --start-tokens out")
        numbers = self._numbers
        self._slots.write(numbers.total_factors(candidate), numbers.total_attention_factor(candidate))
        self._applied = candidate
        return True


@dataclass(frozen=True)
class LlamaCppSource:
    """A GGUF that every worker copies into `folder` for itself (as much room on the disk as the file, each).

    `fingerprint` is that of the file the search was begun with; another one raises `InputFileError`.
    """

    gguf: Path
    numbers: RopeNumbers
    documents: Mapping[str, Sequence[Document]]
    threads: int
    folder: Path
    patch: Patcher
    fingerprint: str

    @contextmanager
    def open(self) -> Iterator[LlamaCppObjective]:
        """The objective on a copy that is removed at the end."""
        if fingerprint(self.gguf) != self.fingerprint:
            raise InputFileError(f"{self.gguf} is another model here than where the search runs; copy the right one")
        unchanged = self.numbers.unchanged()
        with tempfile.TemporaryDirectory(prefix="llamacpp-", dir=self.folder) as name:
            copy = Path(name) / "candidate.gguf"
            self.patch(self.gguf, copy, self.numbers.record(unchanged, unchanged, {}))
            objective = LlamaCppObjective(copy, self.numbers, self.documents, self.threads)
            try:
                yield objective
            finally:
                objective.close()
