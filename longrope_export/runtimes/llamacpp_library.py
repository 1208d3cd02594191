"""Raw logits of whole texts from llama.cpp's C interface, called in the library that an installed wheel carries.

Only what keeps its place from one llama.cpp to the next is touched: the first four fields of the context's parameters
(checked against their defaults), a batch, and functions. Everything else stays as llama.cpp sets it: all layers on a GPU
where there is one, an F16 cache, flash attention where it helps. A failed assertion kills the process: only child
processes may use this.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import MissingDependencyError, RuntimeFailure

# A folder with libllama, for a build of one's own; llama-cpp-python reads the same variable.
LIBRARY_FOLDER = "LLAMA_CPP_LIB_PATH"
# Tokens of one llama_decode: the logits of no more positions exist at once.
CHUNK = 512
_NAMES = {"win32": "llama.dll", "darwin": "libllama.dylib"}
_ROWS = 64  # of logits whose exponentials exist at once

# Logits [n, vocabulary] and the tokens that follow [n] → a number for each.
_Measure = Callable[[npt.NDArray[np.float32], npt.NDArray[np.int64]], npt.NDArray[np.float64]]


class _Context(ctypes.Structure):
    """llama_context_params: four fields that stand first since 2024, and room for the rest of any version.

    By value it is the last argument of the calls it is in, so that more room than needed does no harm.
    """

    _fields_ = (
        ("n_ctx", ctypes.c_uint32), ("n_batch", ctypes.c_uint32), ("n_ubatch", ctypes.c_uint32),
        ("n_seq_max", ctypes.c_uint32), ("rest", ctypes.c_uint64 * 126),
    )  # fmt: skip


class _Model(ctypes.Structure):
    """llama_model_params, as llama.cpp fills it."""

    _fields_ = (("rest", ctypes.c_uint64 * 128),)


class _Batch(ctypes.Structure):
    """llama_batch (since October 2024); a null pointer lets llama.cpp fill in positions and sequences."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p), ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p), ("logits", ctypes.c_void_p),
    )  # fmt: skip


_POINTER = ctypes.c_void_p
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_model_default_params": (_Model, ()),
    "llama_context_default_params": (_Context, ()),
    "llama_model_load_from_file": (_POINTER, (ctypes.c_char_p, _Model)),
    "llama_model_free": (None, (_POINTER,)),
    "llama_model_get_vocab": (_POINTER, (_POINTER,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (_POINTER,)),
    "llama_init_from_model": (_POINTER, (_POINTER, _Context)),
    "llama_free": (None, (_POINTER,)),
    "llama_set_n_threads": (None, (_POINTER, ctypes.c_int32, ctypes.c_int32)),
    "llama_n_ctx": (ctypes.c_uint32, (_POINTER,)),
    "llama_n_batch": (ctypes.c_uint32, (_POINTER,)),
    "llama_n_ubatch": (ctypes.c_uint32, (_POINTER,)),
    "llama_decode": (ctypes.c_int32, (_POINTER, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_POINTER,)),
}


def library_path() -> Path:
    """llama.cpp's shared library: in the folder of `LLAMA_CPP_LIB_PATH`, in xllamacpp, or in llama-cpp-python.

    Raises `MissingDependencyError` where there is none.
    """
    name = _NAMES.get(sys.platform, "libllama.so")
    if folder := os.environ.get(LIBRARY_FOLDER):
        own = Path(folder) / name
        if not own.is_file():
            raise MissingDependencyError(f"{LIBRARY_FOLDER} is {folder}, which holds no {name}")
        return own
    places = [("xllamacpp", "xllamacpp*.so"), ("llama_cpp", f"lib/{name}")]
    for package, pattern in places:
        if found := _inside(package, pattern):
            return found
    raise MissingDependencyError(
        "no llama.cpp library: pip install 'longrope-export[runtime]', or llama-cpp-python where xllamacpp's is closed "
        f"(Windows), or name the folder of your own build in {LIBRARY_FOLDER}"
    )


def library_identity() -> str:
    """What tells the library that is used from another build, without its place on this machine."""
    path = library_path()
    return f"{path.parent.name}/{path.name} of {path.stat().st_size:,} bytes"


def _inside(package: str, pattern: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # a module set to None: blocked
        return None
    folders = (spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob(pattern))), None)


class Library:
    """llama.cpp's functions. Raises `RuntimeFailure` for a library that is too old or lays its records out otherwise."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, list(arguments)
        except (OSError, AttributeError) as error:
            raise RuntimeFailure(f"{path} is not a llama.cpp of 2025 or later: {error}") from None
        self.call: Any = library
        defaults = library.llama_context_default_params()
        found = defaults.n_ctx, defaults.n_batch, defaults.n_ubatch, defaults.n_seq_max
        if found != (512, 2048, 512, 1):
            raise RuntimeFailure(f"{path} lays out a context's parameters in an unknown way: the first are {found}")
        library.llama_backend_init()

    def load(self, gguf: Path) -> LoadedModel:
        """The model of a GGUF file; raises `RuntimeFailure` when llama.cpp refuses it (the log says why)."""
        model = self.call.llama_model_load_from_file(os.fsencode(gguf), self.call.llama_model_default_params())
        if not model:
            raise RuntimeFailure("the model does not load")
        return LoadedModel(self.call, model)


class LoadedModel:
    """A model in llama.cpp's memory until `close`."""

    def __init__(self, call: Any, model: int) -> None:
        self._call, self._model = call, model
        self.vocabulary = int(call.llama_vocab_n_tokens(call.llama_model_get_vocab(model)))

    def close(self) -> None:
        """Free the model."""
        self._call.llama_model_free(self._model)

    def losses(
        self, token_ids: npt.NDArray[np.int64], places: npt.NDArray[np.int64], *, context: int, threads: int
    ) -> npt.NDArray[np.float64]:
        """Cross entropy in nats of token p + 1 given tokens 0…p, for every p in the rising `places`, float64.

        A fresh context of `context` tokens (llama.cpp rounds up to 256) is filled in chunks of `CHUNK`. NaN logits give
        NaN. Raises `RuntimeFailure` when llama.cpp has no memory for it, or a token is not in the vocabulary.
        """
        return self._measured(_cross_entropy, token_ids, places, context, threads)

    def choices(
        self, token_ids: npt.NDArray[np.int64], places: npt.NDArray[np.int64], *, context: int, threads: int
    ) -> npt.NDArray[np.float64]:
        """The most likely token after tokens 0…p, for every p in the rising `places`; as `losses`, NaN for NaN logits."""
        return self._measured(_most_likely, token_ids, places, context, threads)

    def _measured(
        self,
        measure: _Measure,
        token_ids: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        context: int,
        threads: int,
    ) -> npt.NDArray[np.float64]:
        if token_ids.min() < 0 or token_ids.max() >= self.vocabulary:
            raise RuntimeFailure(f"a token id is outside the vocabulary of {self.vocabulary:,}: another model's text")
        handle = self._context(max(context, len(token_ids)), threads)
        try:
            starts = range(0, int(places[-1]) + 1, CHUNK)
            return np.concatenate([self._chunk(handle, measure, token_ids, places, start) for start in starts])
        finally:
            self._call.llama_free(handle)

    def _context(self, context: int, threads: int) -> int:
        params = self._call.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = context, CHUNK, CHUNK
        handle = self._call.llama_init_from_model(self._model, params)
        if not handle:
            raise RuntimeFailure(f"no context of {context:,} tokens: most likely the memory does not hold its cache")
        self._call.llama_set_n_threads(handle, threads, threads)
        made = [int(getattr(self._call, name)(handle)) for name in ("llama_n_ctx", "llama_n_batch", "llama_n_ubatch")]
        if made[0] < context or max(made[1:]) > CHUNK or min(made[1:]) < min(CHUNK, context):
            raise RuntimeFailure(f"llama.cpp was asked for a context of {context}, batches of {CHUNK} and made {made}")
        return int(handle)

    def _chunk(
        self,
        handle: int,
        measure: _Measure,
        token_ids: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        start: int,
    ) -> npt.NDArray[np.float64]:
        tokens = np.ascontiguousarray(token_ids[start : start + CHUNK], dtype=np.int32)
        here = places[(places >= start) & (places < start + CHUNK)]
        wanted = np.zeros(len(tokens), dtype=np.int8)
        wanted[here - start] = 1
        # A chunk without outputs is a case of its own in llama.cpp: its last token is computed and not looked at.
        wanted[-1] |= not len(here)
        pointers = (tokens.ctypes.data, None, None, None, None, wanted.ctypes.data)
        if code := self._call.llama_decode(handle, _Batch(len(tokens), *pointers)):
            raise RuntimeFailure(f"llama_decode failed with {code} at token {start:,}")
        logits = np.ctypeslib.as_array(self._call.llama_get_logits(handle), (max(1, len(here)), self.vocabulary))
        # What follows the last token is not known, and not looked at by who asks for it.
        targets = np.append(token_ids, token_ids[:1])[here + 1]
        blocks = [slice(row, row + _ROWS) for row in range(0, len(here), _ROWS)]
        return np.concatenate([np.zeros(0), *(measure(logits[rows], targets[rows]) for rows in blocks)])


def _cross_entropy(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """−log softmax at `targets` [n] of logits [n, vocabulary]; sums in float64."""
    peak = logits.max(axis=1)
    total = np.exp(logits - peak[:, None]).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(targets)), targets]
    return np.asarray(np.log(total) + (peak.astype(np.float64) - chosen))


def _most_likely(logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Index of the largest of logits [n, vocabulary]; NaN where one of them is NaN or infinite."""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), np.nan)
