"""One llama.cpp that stays: a GGUF loaded once in a child process, asked again and again through its server."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from longrope_export.errors import InputFileError, RuntimeFailure
from longrope_export.runtimes import llamacpp


class Session:
    """A loaded GGUF with a context of `context` tokens (rounded up to 256) and the settings of `llamacpp.run`.

    A context manager. Raises `RuntimeFailure` when llama.cpp refuses the file, crashes, or takes more than `timeout`
    seconds for one answer, `MissingDependencyError` without `xllamacpp`.
    """

    def __init__(
        self,
        gguf: str | os.PathLike[str],
        *,
        context: int,
        threads: int | None = None,
        timeout: float = llamacpp.DEFAULT_TIMEOUT,
    ) -> None:
        llamacpp.version()
        self.gguf, self.context, self.timeout = Path(gguf).absolute(), context, timeout
        if not self.gguf.is_file():
            raise InputFileError(f"{self.gguf} does not exist or is not a file")
        self._folder = tempfile.TemporaryDirectory(prefix="longrope-llamacpp-")
        self._log = Path(self._folder.name) / "log"
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        settings = {"gguf": str(self.gguf), "context": context, "threads": threads or llamacpp.default_threads()}
        self._child = self._start(settings)
        try:
            self._answer()
            llamacpp.check_settings(self._log_text(), context)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(self, prompt: list[int], count: int, *, ignore_eos: bool = False) -> list[int]:
        """Greedy continuation of a prompt of token ids by at most `count` of them."""
        # The last token that is generated is not stored.
        if len(prompt) + count > llamacpp.padded_context(self.context) + 1:
            raise RuntimeFailure(
                f"a prompt of {len(prompt)} tokens and {count} more do not fit into a context of {self.context}"
            )
        answer = self._ask({"job": "generate", "prompt": prompt, "count": count, "ignore_eos": ignore_eos})
        return [int(token) for token in answer["tokens"]]

    def close(self) -> None:
        """End the child; its memory is free afterwards."""
        if self._child.stdin:
            self._child.stdin.close()
        self._child.kill()
        self._child.wait()
        self._reader.join()
        if self._child.stdout:
            self._child.stdout.close()
        self._folder.cleanup()

    def _start(self, settings: dict[str, Any]) -> subprocess.Popen[str]:
        folder = Path(self._folder.name)
        (folder / "request.json").write_text(json.dumps({"job": "serve", **settings}))
        command = [sys.executable, "-P", "-m", "longrope_export.runtimes.llamacpp_worker", str(folder)]
        with self._log.open("wb") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            )  # fmt: skip
        assert child.stdout is not None
        # A thread, because a pipe cannot be read with a time limit on every system.
        self._reader = threading.Thread(target=self._read, args=(child.stdout,), daemon=True)
        self._reader.start()
        return child

    def _read(self, pipe: IO[str]) -> None:
        for line in pipe:
            self._answers.put(line)
        self._answers.put("")

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        except (OSError, ValueError):  # it died, or was closed: the answer below says how
            pass
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=self.timeout)
        except queue.Empty:
            raise RuntimeFailure(
                f"llama.cpp did not answer for {self.gguf} in {self.timeout:g} s; allow more time"
            ) from None
        if not line:
            death = llamacpp.cause_of_death(self._child.wait())
            raise RuntimeFailure(
                f"llama.cpp died {death} on {self.gguf}: {llamacpp.last_meaningful_line(self._log_text())}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            reason = llamacpp.last_meaningful_line(self._log_text()) if answer.get("refused") else answer["error"]
            raise RuntimeFailure(f"llama.cpp refused {self.gguf}: {reason}")
        return answer

    def _log_text(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")
