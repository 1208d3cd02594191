"""Losses of texts as llama.cpp computes them from raw logits, in a child process that may die instead of the caller."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from longrope_export import errors
from longrope_export.errors import RuntimeFailure
from longrope_export.runtimes.llamacpp import cause_of_death, last_meaningful_line

Ids = npt.NDArray[np.int64]


class LlamaCppScorer:
    """The process that llama.cpp runs in with one GGUF, and its log; `called` is what errors call the file.

    Everything but the context is as llama.cpp runs the file by default. Methods raise `RuntimeFailure` when llama.cpp
    refuses the file or dies (the scorer must be closed then), `MissingDependencyError` without a llama.cpp.
    """

    def __init__(self, gguf: Path, threads: int, called: str) -> None:
        self._gguf, self._threads, self._called = gguf, threads, called
        # Appending, so that emptying it between two texts leaves no hole; llama.cpp writes pages each time it loads.
        self._log: IO[bytes] = tempfile.TemporaryFile("a+b")  # noqa: SIM115 - closed in `close`
        command = [sys.executable, "-P", "-m", "longrope_export.runtimes.llamacpp_scoring_worker"]
        # Without this a failed assertion starts a debugger to print its backtrace.
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        self.process: subprocess.Popen[str] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment, text=True
        )

    def losses(self, token_ids: Ids, places: Ids, context: int, *, changed: bool = False) -> npt.NDArray[np.float64]:
        """Cross entropy in nats of token p + 1 given tokens 0…p, for every p in the rising `places`, float64.

        The context is a fresh one of `context` tokens; `changed`: the file is read again. NaN logits give NaN.
        """
        return self._ask("losses", token_ids, places, context, changed)

    def choices(self, token_ids: Ids, places: Ids, context: int) -> npt.NDArray[np.float64]:
        """The most likely token after tokens 0…p, for every p in the rising `places`; NaN for NaN logits."""
        return self._ask("choices", token_ids, places, context, False)

    def _ask(self, wanted: str, token_ids: Ids, places: Ids, context: int, changed: bool) -> npt.NDArray[np.float64]:
        request = {
            "wanted": wanted, "gguf": str(self._gguf), "changed": changed, "token_ids": token_ids.tolist(),
            "places": places.tolist(), "context": context, "threads": self._threads,
        }  # fmt: skip
        return np.array(self._answer(request)["values"], dtype=np.float64)

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._log.truncate(0)
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            cause = cause_of_death(self.process.wait())
            raise RuntimeFailure(f"llama.cpp died {cause} on {self._called}: {last_meaningful_line(self._log_text())}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise self._error(answer)
        return answer

    def close(self) -> None:
        """End the process, in the middle of a text too."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self._log.close()

    def _error(self, answer: Mapping[str, str]) -> errors.LongRopeError:
        kind: type[errors.LongRopeError] = getattr(errors, answer["kind"])
        if kind is not RuntimeFailure:
            return kind(answer["error"])
        # llama.cpp names the cause first and its consequences after it.
        cause = next((line for line in self._log_text().splitlines() if "error" in line), "")
        return RuntimeFailure(f"llama.cpp refused {self._called}: {answer['error']}: {cause}".rstrip(": "))

    def _log_text(self) -> str:
        self._log.seek(0)
        return self._log.read().decode("utf-8", "replace")
