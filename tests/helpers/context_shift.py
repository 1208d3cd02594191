"""What a context shift does to a GGUF in llama.cpp: run as a script, because a failed assertion kills the process.

python context_shift.py GGUF CONTEXT SHIFT… prints, for each list of shifts such as `16` or `16,-16`, the largest difference
in log-probability of the next token after those shifts of a prompt's whole cache, against the same prompt unshifted.
RoPE is relative, so that an exact shift changes nothing.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# In llama_context_params, by their defaults: rope scaling, pooling, attention and flash attention; the K and V types.
ENUMS, TYPES = [-1, -1, -1, -1], [1, 1]
PROMPT = [(7 * index * index + 3) % 250 + 2 for index in range(120)]


def shift_errors(gguf: Path, context: int, *shifts: str) -> list[float]:
    """Run this script in a child process; one number in nats for each list of shifts."""
    command = [sys.executable, __file__, str(gguf), str(context), *shifts]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(value) for value in json.loads(done.stdout)]


def exact_settings(params: Any) -> None:
    """Flash attention off (it computes in F16) and a cache in F32, whose places differ from build to build."""
    rest = ctypes.cast(ctypes.addressof(params) + 16, ctypes.POINTER(ctypes.c_int32))
    values = [rest[index] for index in range(64)]
    flash = [index + 3 for index in range(60) if values[index : index + 4] == ENUMS and values[index + 4] != -1]
    types = [index for index in range(4, 60) if values[index : index + 2] == TYPES]
    assert len(flash) == len(types) == 1, values
    rest[flash[0]] = rest[types[0]] = rest[types[0] + 1] = 0


def main(gguf: Path, context: int, shifts: list[str]) -> None:
    from longrope_export.runtimes.llamacpp_library import CHUNK, Library, library_path

    library = Library(library_path())
    call = library.call
    call.llama_get_memory.restype, call.llama_get_memory.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    call.llama_memory_seq_add.restype = None
    call.llama_memory_seq_add.argtypes = [ctypes.c_void_p, *([ctypes.c_int32] * 4)]
    model = library.load(gguf)

    def after(moves: list[int]) -> npt.NDArray[np.float64]:
        params = call.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, CHUNK, CHUNK
        exact_settings(params)
        handle = call.llama_init_from_model(model._model, params)
        decode(PROMPT[:-1], handle)
        for move in moves:
            call.llama_memory_seq_add(call.llama_get_memory(handle), 0, 0, -1, move)
            # a shift is carried out with the next call; this token is then shifted with the rest
            decode(PROMPT[:1], handle)
        for _ in range(2 - len(moves)):
            decode(PROMPT[:1], handle)
        logits = decode(PROMPT[-1:], handle)
        call.llama_free(handle)
        return logits - np.logaddexp.reduce(logits)

    def decode(tokens: list[int], handle: int) -> npt.NDArray[np.float64]:
        from longrope_export.runtimes.llamacpp_library import _Batch

        ids = np.array(tokens, dtype=np.int32)
        wanted = np.zeros(len(ids), dtype=np.int8)
        wanted[-1] = 1
        pointers = (ids.ctypes.data, None, None, None, None, wanted.ctypes.data)
        assert call.llama_decode(handle, _Batch(len(ids), *pointers)) == 0
        return np.ctypeslib.as_array(call.llama_get_logits(handle), (model.vocabulary,)).astype(np.float64)

    still = after([])
    lists = [[int(move) for move in text.split(",")] for text in shifts]
    print(json.dumps([float(np.abs(after(moves) - still).max()) for moves in lists]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
