"""The engine that lets llama.cpp run a GGUF: losses from its raw logits, generation by its server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import NumericalError, RuntimeFailure, ScalingError
from longrope_export.evaluation.rows import FactorSet, ModelRow
from longrope_export.runtimes import llamacpp
from longrope_export.runtimes.llamacpp_library import library_path
from longrope_export.runtimes.llamacpp_scorer import LlamaCppScorer
from longrope_export.runtimes.llamacpp_session import Session

Ids = Sequence[int] | npt.NDArray[np.int64]


class LlamaCppEngine:
    """A GGUF in child processes. The size of its context, `context` tokens, decides which factors llama.cpp applies.

    Raises `MissingDependencyError` without a llama.cpp.
    """

    runtime = "llamacpp"

    def __init__(self, gguf: Path, tokenizer: Any, threads: int | None) -> None:
        library_path()
        self.gguf, self.tokenizer, self.context = gguf, tokenizer, llamacpp.CONTEXT_GRANULE
        self.threads = threads or llamacpp.default_threads()
        self.window: int | None = None
        self._scorer: LlamaCppScorer | None = None
        self._session: Session | None = None

    def rotate(self, row: ModelRow, factors: FactorSet, length: int) -> None:
        """Have sequences of `length` tokens computed in a context that gives `factors`; raises `ScalingError`."""
        self.context, self.window = context_for(row, factors, length), row.model.window

    def losses(self, token_ids: Ids, first: int = 1, offset: int = 0) -> npt.NDArray[np.float32]:
        """Cross entropy in nats of tokens `first`…, float32; see `protocol.Engine`."""
        if offset:
            raise RuntimeFailure("llama.cpp numbers positions from 0; leave out --position-offset")
        return self._scored("losses", token_ids, first).astype(np.float32)

    def choices(self, token_ids: Ids, first: int) -> npt.NDArray[np.int64]:
        """The argmax in the places `first`…, int64; see `protocol.Engine`."""
        return self._scored("choices", token_ids, first).astype(np.int64)

    def generate(self, prompt_ids: Sequence[int], count: int) -> list[int]:
        """Greedy continuation by at most `count` token ids; it ends before EOS, and where the file's window does.

        llama.cpp's server takes no prompt that fills the window which the file declares, whatever its context: no answer.
        """
        if self.window is not None and len(prompt_ids) >= self.window:
            return []
        try:
            found = self._server().generate([int(token) for token in prompt_ids], count)
        except RuntimeFailure:
            self.close()
            raise
        return found[:-1] if found and found[-1] == self.tokenizer.eos_token_id else found

    def _server(self) -> Session:
        """llama.cpp's server with the context that gives the right factors; another context is another server."""
        if self._session and self._session.context != self.context:
            self._session.close()
            self._session = None
        self._session = self._session or Session(self.gguf, context=self.context, threads=self.threads)
        return self._session

    def close(self) -> None:
        """End the child processes."""
        for child in (self._scorer, self._session):
            if child:
                child.close()
        self._scorer = self._session = None

    def _scored(self, wanted: str, token_ids: Ids, first: int) -> npt.NDArray[np.float64]:
        ids = np.asarray(token_ids, dtype=np.int64)
        places = np.arange(first - 1, len(ids) - 1)
        self._scorer = self._scorer or LlamaCppScorer(self.gguf, self.threads, str(self.gguf))
        try:
            values: npt.NDArray[np.float64] = getattr(self._scorer, wanted)(ids, places, max(self.context, len(ids)))
        except RuntimeFailure:
            self.close()
            raise
        if not np.isfinite(values).all():
            place = int(np.flatnonzero(~np.isfinite(values))[0]) + first + 1
            raise NumericalError(f"llama.cpp gives NaN or infinite logits for token {place:,}; the file may be broken")
        return values


def context_for(row: ModelRow, factors: FactorSet, length: int) -> int:
    """Tokens of a context in which llama.cpp applies `factors` to a sequence of `length`, with room for one more if any.

    Raises `ScalingError` where there is none: it takes the long factors in every context above L, rounded up to 256.
    """
    window = row.model.original_window
    if row.switch == "context" and row.context:
        length = max(length, row.context)
    # At the end of its context llama.cpp stops, and the token after an answer tells whether its number is longer.
    roomy = length + 1
    if factors.label == "long":
        return max(roomy, window + 1)
    if factors.label == "short" and llamacpp.padded_context(length) > window:
        raise ScalingError(
            f"llama.cpp applies the long factors of {row.name} in a context of {llamacpp.padded_context(length):,} "
            f"tokens, the smallest that holds {length:,}; ask for a length of which a multiple of 256 is at most {window:,}"
        )
    return length if factors.label == "short" and llamacpp.padded_context(roomy) > window else roomy
