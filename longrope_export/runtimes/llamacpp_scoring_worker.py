"""The child process of `llamacpp_scorer`: holds one GGUF in llama.cpp and scores texts, one JSON line each.

A failed assertion inside llama.cpp kills the interpreter, so nothing else lives here. Requests come on stdin, answers go
to stdout, llama.cpp's log to stderr, which the owner keeps. It leaves when stdin ends, in the middle of a text too.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.errors import LongRopeError
from longrope_export.runtimes.llamacpp_library import Library, LoadedModel, library_path


def main() -> None:
    """Answer every line of stdin."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever else writes to stdout must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    scorer = Scorer()
    while True:
        try:
            answer = scorer.answer(json.loads(requests.get()))
        except LongRopeError as error:
            answer = {"error": str(error), "kind": type(error).__name__}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Scorer:
    """The model in memory; it is loaded again when a request says that the file has changed."""

    def __init__(self) -> None:
        self._library: Library | None = None
        self._model: LoadedModel | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The losses, or the most likely tokens, that a request asks for."""
        token_ids, places = np.array(request["token_ids"]), np.array(request["places"])
        model = self._loaded(Path(request["gguf"]), request["changed"])
        measure = {"losses": model.losses, "choices": model.choices}[request["wanted"]]
        values = measure(token_ids, places, context=request["context"], threads=request["threads"])
        return {"values": values.tolist(), "library": str(self._library and self._library.path)}

    def _loaded(self, gguf: Path, changed: bool) -> LoadedModel:
        self._library = self._library or Library(library_path())
        if self._model is not None and changed:
            self._model.close()
            self._model = None
        self._model = self._model or self._library.load(gguf)
        return self._model


def _read(requests: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
