"""A search from a model's path and text files to `OUT/longrope.json`, continued when it was stopped."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.denormals import flushed_denormals
from longrope_export.description import ModelDescription, describe
from longrope_export.errors import LongRopeError, OutputError, UnsupportedModelError
from longrope_export.files import write_text
from longrope_export.fingerprint import fingerprint
from longrope_export.lengths import resolve_length
from longrope_export.scaling import RopeScaling
from longrope_export.search.config import LLAMACPP, SearchConfig
from longrope_export.search.executors import InProcess
from longrope_export.search.factors import (
    Progress,
    Run,
    SearchResult,
    SearchStopped,
    check_budget,
    read_init,
    search_factors,
    search_measured,
    search_parts,
)
from longrope_export.search.identity import search_header
from longrope_export.search.llamacpp_objective import Patcher
from longrope_export.search.measuring import (
    JOURNAL,
    check_measuring,
    llamacpp_engine,
    llamacpp_source,
    model_workers,
    open_workers,
    worker_threads,
)
from longrope_export.search.protocol import Executor
from longrope_export.search.space import RopeNumbers, ShortSet

__all__ = [
    "JOURNAL",
    "RECORD",
    "SearchConfig",
    "SearchResult",
    "SearchStopped",
    "numbers_of",
    "run_search",
    "search_factors",
]

RECORD = "longrope.json"
# Below this many parameters float32 is quick enough, and exact; above it weights are read as bfloat16.
_FLOAT32_PARAMETERS = 50_000_000


def run_search(config: SearchConfig, progress: Progress | None = None, patch: Patcher | None = None) -> SearchResult:
    """Search factors for `config.model` on the texts `config.data` and write `config.out`/longrope.json.

    What is wrong with the input is found before the weights are read. A search stopped in the same folder is
    continued; the objective "llamacpp" needs `patch`, the function `patch_gguf`. On Ctrl-C the best so far is written
    and `SearchStopped` raised. Raises `LongRopeError` and its kinds: a text shorter than L', a window that does not
    grow, an unknown architecture, dynamic NTK scaling, a folder that belongs to something else.
    """
    with opened(config, patch) as inputs:
        assert config.out is not None
        config.out.mkdir(parents=True, exist_ok=True)
        try:
            result = _search(config, inputs, config.out / JOURNAL, progress, patch)
        except SearchStopped as stopped:
            if stopped.best:
                _write_best(config.out / RECORD, stopped.best.scaling.to_json())
            raise
        write_text(config.out / RECORD, result.scaling.to_json(), overwrite=True)
    return result


def _write_best(path: Path, record: str) -> None:
    """Write the best so far, unless a record of the same search is there that is complete or comes from further on.

    A search that is stopped while it goes through its journal again knows less than when it was stopped before.
    """
    with contextlib.suppress(OSError, UnicodeDecodeError, LongRopeError):
        there, now = (RopeScaling.from_json(text).provenance for text in (path.read_text("utf-8"), record))
        same = all(there.get(name) == now.get(name) for name in ("model", "configuration", "data", "init"))
        if same and _progress(there) > _progress(now):
            return
    write_text(path, record, overwrite=True)


def _progress(provenance: Mapping[str, Any]) -> tuple[bool, float, float]:
    """How far a search was when it left its record: complete, what it had spent, and how good its best was."""
    known = [*provenance["search_perplexity"].values(), *provenance["validation_perplexity"].values()]
    spent = provenance["evaluations"] + provenance["validation_evaluations"]
    return provenance["complete"], spent, -min((value for value in known if value is not None), default=math.inf)


def _search(
    config: SearchConfig, inputs: Inputs, journal: Path, progress: Progress | None, patch: Patcher | None
) -> SearchResult:
    if config.engine == LLAMACPP and patch is not None:
        return _llamacpp_search(config, inputs, journal, progress, patch)
    return search_factors(
        inputs.model, inputs.numbers, inputs.rows, config, journal, kind=inputs.kind, fingerprint=inputs.fingerprint,
        progress=progress, tokenizer=inputs.tokenizer, workers=model_workers(config, inputs),
    )  # fmt: skip


def _llamacpp_search(
    config: SearchConfig, inputs: Inputs, journal: Path, progress: Progress | None, patch: Patcher
) -> SearchResult:
    numbers = inputs.numbers
    resolved = config.with_texts(len(inputs.rows), inputs.tokenizer, numbers.target).resolve(numbers, inputs.kind)
    init, tokenizer = read_init(resolved, numbers), inputs.tokenizer
    parts = search_parts(inputs.rows, numbers, resolved, tokenizer.bos_token_id, tokenizer)
    with llamacpp_source(config, inputs, parts, patch) as source, source.open() as objective:
        header = search_header(llamacpp_engine(source), numbers, resolved, parts, init, inputs.fingerprint)

        def executor() -> AbstractContextManager[Executor]:
            if config.executor == "local":
                return contextlib.nullcontext(InProcess(objective))
            return open_workers(config, source, source.threads)

        return search_measured(Run(objective, executor, header, init), numbers, resolved, parts, journal, progress)


@dataclass(frozen=True)
class Inputs:
    """What a search reads: the model in memory (None when llama.cpp measures), its numbers, kind, fingerprint and
    dtype, token rows, the tokenizer, and how the model is placed on devices.
    """

    model: Any
    numbers: RopeNumbers
    kind: str
    fingerprint: str
    dtype: str
    rows: list[npt.NDArray[np.int64]]
    tokenizer: Any
    placement: Mapping[str, Any]


@contextlib.contextmanager
def opened(config: SearchConfig, patch: Patcher | None = None) -> Iterator[Inputs]:
    """Everything that `config` names, with its thread count set; what is wrong is found before the weights are read."""
    if config.model is None or config.out is None or not config.data:
        raise LongRopeError("a search needs a model, at least one text and an output folder")
    description = describe(config.model)
    numbers = numbers_of(description, config.target)
    resolved = config.resolve(numbers, description.kind)
    check_measuring(resolved, description.kind, patch)
    check_budget(resolved, numbers)
    read_init(resolved, numbers)
    check_folder(config.out)
    with flushed_denormals(), _threads(worker_threads(config)):
        # Heavy imports: only now, when the cheap checks are passed.
        import torch

        from longrope_export.evaluation.documents import evaluation_rows, load_tokenizer
        from longrope_export.loader import load
        from longrope_export.placement import placement_options

        placement = placement_options(config.device_map, config.max_memory)
        least, most = config.needed_rows
        tokenizer = load_tokenizer(config.model)
        rows = evaluation_rows(config.data, tokenizer, numbers.target, most, least=least)
        dtype = choose_dtype(config.dtype, description)
        model = None if config.engine == LLAMACPP else load(config.model, dtype=getattr(torch, dtype), **placement)
        ids = [row.token_ids for row in rows]
        yield Inputs(model, numbers, description.kind, fingerprint(config.model), dtype, ids, tokenizer, placement)


def numbers_of(description: ModelDescription, target: str) -> RopeNumbers:
    """The numbers of a described model and the length meant by `target` (`16384`, `32k` or `4x`).

    A model that carries one fixed scaling (YaRN, Llama-3, linear) is searched on top of it, one with longrope factors
    on top of its long ones: its short window and short factors stay. Raises `UnsupportedModelError` for dynamic NTK,
    `ScalingError` when the window does not grow.
    """
    if description.rope_type == "dynamic":
        raise UnsupportedModelError(
            f"{description.path} carries dynamic NTK scaling, whose factors change with the length: take it out of the "
            "model's configuration first"
        )
    return RopeNumbers(
        rope_theta=description.rope_theta,
        rotary_dim=description.rotary_dim,
        window=description.window,
        target=resolve_length(target, description.window),
        **_present_factors(description),
    )


def _present_factors(description: ModelDescription) -> dict[str, Any]:
    scaling = description.scaling
    if scaling is None or scaling.is_static:
        present = description.existing_factors or ()
        start = scaling.long_start_tokens if scaling else 0
        attention = description.existing_attention_factor
        return {"base_factors": present, "base_attention_factor": attention, "base_start_tokens": start}
    short = ShortSet(
        window=scaling.original_max_position_embeddings,
        factors=scaling.short_factor,
        attention_factor=scaling.short_attention_factor,
        start_tokens=scaling.short_start_tokens,
    )
    return {
        "base_factors": scaling.long_factor,
        "base_attention_factor": scaling.long_attention_factor,
        "base_start_tokens": scaling.long_start_tokens,
        "switched": short,
    }


def check_folder(out: Path) -> None:
    """Raise `OutputError` when `out` is not a folder to begin or continue a search in."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder")
    if out.is_dir() and any(out.iterdir()) and not (out / JOURNAL).is_file():
        raise OutputError(f"{out} is not empty and holds no search to continue; name another --out")


def choose_dtype(dtype: str, description: ModelDescription) -> str:
    """The dtype of the weights: "auto" is float32 for small models and bfloat16 for others."""
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise LongRopeError(f"the dtype {dtype!r} is not known; choose auto, float32, bfloat16 or float16")
    if dtype != "auto":
        return dtype
    return "float32" if description.parameters <= _FLOAT32_PARAMETERS else "bfloat16"


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    if count < 1:
        raise LongRopeError(f"threads is {count}; at least 1 is needed")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
