"""Run a GGUF in a real llama.cpp (the prebuilt `xllamacpp` wheel) in a child process."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import InputFileError, MissingDependencyError, RuntimeFailure

# llama.cpp rounds every context up to a multiple of this (llama-context.cpp).
CONTEXT_GRANULE = 256
DEFAULT_TIMEOUT = 3600.0

_NOISE = re.compile(r"^[\d.]+ ([A-Z]) +")
_TELLING = re.compile(r"GGML_ASSERT|GGML_ABORT|error|failed|invalid|unsupported|wrong|missing|corrupt", re.IGNORECASE)
_SETTINGS = {"flash_attn": "disabled", "kv_unified": "false", "n_seq_max": "1"}


@dataclass(frozen=True)
class Outcome:
    """What a child process gave back: its answer, the probabilities [n, vocabulary] if any, and llama.cpp's log."""

    answer: dict[str, Any]
    probabilities: npt.NDArray[np.float32] | None
    log: str


def available() -> bool:
    """Whether the `xllamacpp` wheel is installed."""
    try:
        return importlib.util.find_spec("xllamacpp") is not None
    except ValueError:  # a module set to None: blocked
        return False


def version() -> str:
    """Version of the installed `xllamacpp` wheel; raises `MissingDependencyError` when it is absent."""
    import importlib.metadata

    _require()
    return importlib.metadata.version("xllamacpp")


def padded_context(context: int) -> int:
    """The context in tokens that llama.cpp allocates when asked for `context`."""
    return -(-context // CONTEXT_GRANULE) * CONTEXT_GRANULE


def next_token_probabilities(
    gguf: str | os.PathLike[str],
    prompts: list[list[int]],
    *,
    context: int,
    threads: int | None = None,
    reuse_prefix: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> npt.NDArray[np.float32]:
    """Log-probabilities (natural, normalised) of every token after every prompt of token ids, [prompts, vocabulary].

    Computed with the K/V cache in F32, flash attention, context shift and parameter fitting off, one slot, and a
    context of `context` tokens rounded up to 256, which is asserted. `reuse_prefix` keeps the cache between prompts,
    so that growing prefixes of one text cost one prefill. Raises `RuntimeFailure` when llama.cpp crashes, refuses the
    file or exceeds `timeout` seconds, `MissingDependencyError` without `xllamacpp`.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not longest or not min(map(len, prompts)):
        raise RuntimeFailure("llama.cpp needs at least one prompt, and at least one token in each")
    if longest >= padded_context(context):
        raise RuntimeFailure(f"a prompt of {longest} tokens leaves no room in a context of {context}; ask for more")
    request = {"job": "probabilities", "prompts": prompts, "reuse_prefix": reuse_prefix}
    outcome = run(gguf, request, context=context, threads=threads, timeout=timeout)
    if outcome.probabilities is None or not np.isfinite(outcome.probabilities).all():
        raise RuntimeFailure(f"llama.cpp computed NaN or infinite probabilities with {Path(gguf)}")
    return outcome.probabilities


def tokenize(
    gguf: str | os.PathLike[str],
    texts: list[str],
    *,
    add_special: bool = False,
    parse_special: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> list[list[int]]:
    """Token ids of every text by llama.cpp's own tokenizer; raises as `next_token_probabilities`."""
    request = {"job": "tokenize", "texts": texts, "add_special": add_special, "parse_special": parse_special}
    answer = run(gguf, request, context=CONTEXT_GRANULE, timeout=timeout).answer
    return [[int(token) for token in tokens] for tokens in answer["tokens"]]


def generate(
    gguf: str | os.PathLike[str],
    prompt: list[int],
    count: int,
    *,
    context: int,
    threads: int | None = None,
    ignore_eos: bool = False,
    timeout: float = DEFAULT_TIMEOUT,
) -> list[int]:
    """Greedy continuation by at most `count` token ids; raises as `next_token_probabilities`."""
    request = {"job": "generate", "prompt": prompt, "count": count, "ignore_eos": ignore_eos}
    answer = run(gguf, request, context=context, threads=threads, timeout=timeout).answer
    return [int(token) for token in answer["tokens"]]


def logs(gguf: str | os.PathLike[str], *, context: int = CONTEXT_GRANULE, timeout: float = DEFAULT_TIMEOUT) -> str:
    """llama.cpp's log of loading the file and allocating `context` tokens; raises as `next_token_probabilities`."""
    return run(gguf, {"job": "load"}, context=context, timeout=timeout).log


def run(
    gguf: str | os.PathLike[str],
    request: dict[str, Any],
    *,
    context: int,
    threads: int | None = None,
    timeout: float = DEFAULT_TIMEOUT,
) -> Outcome:
    """Run one job of `llamacpp_worker` on the file and check the settings that llama.cpp logged."""
    _require()
    path = Path(gguf).absolute()
    if not path.is_file():
        raise InputFileError(f"{path} does not exist or is not a file")
    with tempfile.TemporaryDirectory(prefix="longrope-llamacpp-") as name:
        folder = Path(name)
        settings = {"gguf": str(path), "context": context, "threads": threads or default_threads()}
        (folder / "request.json").write_text(json.dumps({**request, **settings}))
        outcome = _run_child(folder, path, timeout)
    check_settings(outcome.log, context)
    return outcome


def default_threads() -> int:
    """`OMP_NUM_THREADS` where it is set, else the CPUs that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted):
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _require() -> None:
    if not available():
        raise MissingDependencyError("llama.cpp is needed: pip install 'longrope-export[runtime]' (or xllamacpp)")


def _run_child(folder: Path, gguf: Path, timeout: float) -> Outcome:
    command = [sys.executable, "-P", "-m", "longrope_export.runtimes.llamacpp_worker", str(folder)]
    # Without this a failed assertion starts a debugger to print its backtrace.
    environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    log_file = folder / "log"
    with log_file.open("wb") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            raise RuntimeFailure(f"llama.cpp did not finish {gguf} in {timeout:g} s; allow more time") from None
    text = log_file.read_text(encoding="utf-8", errors="replace")
    answer_file = folder / "answer.json"
    if not answer_file.is_file():
        raise RuntimeFailure(f"llama.cpp died {cause_of_death(code)} on {gguf}: {last_meaningful_line(text)}")
    answer = json.loads(answer_file.read_text())
    if "error" in answer:
        # A load error reaches Python as one fixed sentence; the reason stands in the log only.
        reason = last_meaningful_line(text) if answer.get("refused") else answer["error"]
        raise RuntimeFailure(f"llama.cpp refused {gguf}: {reason}")
    table = folder / "probabilities.npy"
    return Outcome(answer, np.load(table, allow_pickle=False) if table.is_file() else None, text)


def cause_of_death(code: int) -> str:
    """How a process that ended with `code` ended: `with exit code 3`, `by SIGKILL`."""
    if code >= 0:
        return f"with exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def last_meaningful_line(log: str) -> str:
    """The last line of llama.cpp's log that names an error, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if _level(line) == "E" and "~" not in line]
    telling = [line for line in lines if _TELLING.search(line)]
    assertions = [line for line in telling if "GGML_A" in line]
    chosen = assertions or errors[:1] or telling or lines or ["no log"]
    return _NOISE.sub("", chosen[-1])[:300]


def _level(line: str) -> str:
    match = _NOISE.match(line)
    return match.group(1) if match else ""


def check_settings(log: str, context: int) -> None:
    """Raise `RuntimeFailure` unless the log shows a context of `context` (rounded up to 256) and exact settings."""
    wanted = {**_SETTINGS, "n_ctx_seq": str(padded_context(context))}
    for name, value in wanted.items():
        found = re.search(rf"llama_context: {name}\s*= (\S+)", log)
        if not found or found.group(1) != value:
            shown = found.group(1) if found else "nothing"
            raise RuntimeFailure(f"llama.cpp was asked for {name} = {value} and allocated {shown}")
    if not re.search(r"K \(f32\): .* V \(f32\):", log):
        raise RuntimeFailure("llama.cpp did not keep its K/V cache in F32")
