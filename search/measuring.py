"""What measures a search's candidates, and where: torch or llama.cpp, in this process, in several, or on Ray."""

from __future__ import annotations

import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.errors import LongRopeError, UnsupportedModelError
from longrope_export.runtimes import llamacpp
from longrope_export.runtimes.llamacpp_library import library_identity, library_path
from longrope_export.search.config import LLAMACPP, SearchConfig
from longrope_export.search.documents import Parts
from longrope_export.search.executors import (
    InProcess,
    ModelSource,
    ObjectiveSource,
    Processes,
    RayWorkers,
    check_ray,
    cluster_threads,
)
from longrope_export.search.journal import Journal
from longrope_export.search.llamacpp_objective import LlamaCppSource, Patcher
from longrope_export.search.protocol import Executor

if TYPE_CHECKING:
    from longrope_export.search.run import Inputs

JOURNAL = "journal.jsonl"
# Begins the name of the folder of copies of a GGUF in the output folder; only a killed search leaves one there.
_COPIES = "llamacpp-"


def check_measuring(config: SearchConfig, kind: str, patch: Patcher | None) -> None:
    """Raise the error of an engine or executor that cannot serve a resolved `config`, before anything is loaded."""
    if config.executor == "ray":
        check_ray()
    if config.engine != LLAMACPP:
        return
    if config.device_map is not None:
        raise LongRopeError("--device-map places a model of torch; llama.cpp uses the GPU by itself: leave it out")
    if kind != "gguf":
        raise UnsupportedModelError("--objective llamacpp searches a GGUF file; give one as MODEL (longrope export)")
    if config.method == "gradient":
        raise LongRopeError(
            "llama.cpp gives no gradients: --objective llamacpp needs --strategy evolution or cmaes "
            "(or critical-dim with --optimiser cmaes or evolution)"
        )
    if patch is None:
        raise LongRopeError("the objective llamacpp needs patch=longrope_export.converters.gguf.patch.patch_gguf")
    library_path()


def worker_threads(config: SearchConfig) -> int | None:
    """CPU threads of one worker: those asked for, else an even share of this machine's, or of the Ray cluster's where
    one runs; None leaves it to torch.
    """
    if config.threads is not None or config.executor == "local":
        return config.threads
    if config.executor == "ray" and (found := cluster_threads(config.worker_count)):
        return found
    return max(1, llamacpp.default_threads() // config.worker_count)


def open_workers(config: SearchConfig, source: ObjectiveSource, threads: int) -> AbstractContextManager[Executor]:
    """The executor of `config` with its workers, on what `source` opens in each of them."""
    if config.executor == "ray":
        # llama.cpp takes a GPU by itself, torch where the device map says so.
        gpus = config.engine == LLAMACPP or config.device_map not in (None, "cpu")
        return RayWorkers(source, config.worker_count, threads, gpus=gpus)
    if config.executor == "processes":
        return Processes(source, config.worker_count)
    return _in_process(source)


@contextmanager
def _in_process(source: ObjectiveSource) -> Iterator[Executor]:
    with source.open() as objective:
        yield InProcess(objective)


def model_workers(config: SearchConfig, inputs: Inputs) -> Callable[[Parts], AbstractContextManager[Executor]] | None:
    """What opens the workers of a torch search on its documents; None to measure in this process."""
    if config.executor == "local":
        return None

    def workers(parts: Parts) -> AbstractContextManager[Executor]:
        import torch

        threads = torch.get_num_threads()
        path = Path(str(config.model)).absolute()
        source = ModelSource(path, inputs.dtype, inputs.numbers, parts, threads, inputs.fingerprint, inputs.placement)
        return open_workers(config, source, threads)

    return workers


@contextmanager
def llamacpp_source(config: SearchConfig, inputs: Inputs, parts: Parts, patch: Patcher) -> Iterator[LlamaCppSource]:
    """The source of a llama.cpp search; its copies stand in the output folder and are removed at the end."""
    out, model = Path(str(config.out)).absolute(), Path(str(config.model)).absolute()
    # Whoever can have the journal has the folder: what else is there was left by a search that was killed.
    with Journal(out / JOURNAL):
        for left in out.glob(f"{_COPIES}*"):
            shutil.rmtree(left, ignore_errors=True)
    threads = worker_threads(config) or llamacpp.default_threads()
    with tempfile.TemporaryDirectory(prefix=_COPIES, dir=out, ignore_cleanup_errors=True) as folder:
        yield LlamaCppSource(model, inputs.numbers, parts, threads, Path(folder), patch, inputs.fingerprint)


def llamacpp_engine(source: LlamaCppSource) -> dict[str, Any]:
    """The fields of a search's identity that depend on llama.cpp."""
    return {
        "threads": source.threads,
        "device": f"llama.cpp on {platform.machine()}",
        "dtype": "as in the file",
        "library": library_identity(),
    }
