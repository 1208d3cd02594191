"""A search from a model's path and text files to `OUT/longrope.json`, continued when it was stopped."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from longrope_export.description import ModelDescription, describe
from longrope_export.errors import LongRopeError, OutputError, UnsupportedModelError
from longrope_export.files import write_text
from longrope_export.fingerprint import fingerprint
from longrope_export.search.config import SearchConfig
from longrope_export.search.factors import Progress, SearchResult, check_budget, read_init, search_factors
from longrope_export.search.space import RopeNumbers

__all__ = ["JOURNAL", "RECORD", "SearchConfig", "SearchResult", "numbers_of", "run_search", "search_factors"]

JOURNAL, RECORD = "journal.jsonl", "longrope.json"
# Below this many parameters float32 is quick enough, and exact; above it weights are read as bfloat16.
_FLOAT32_PARAMETERS = 50_000_000


def run_search(config: SearchConfig, progress: Progress | None = None) -> SearchResult:
    """Search factors for `config.model` on the texts `config.data` and write `config.out`/longrope.json.

    What is wrong with the input is found before the weights are read. A search stopped in the same folder is
    continued. Raises `LongRopeError` and its kinds: a text shorter than L', a window that does not grow, an unknown
    architecture, longrope factors that are already there, a folder that belongs to something else.
    """
    if config.model is None or config.out is None or not config.data:
        raise LongRopeError("a search needs a model, at least one text and an output folder")
    description = describe(config.model)
    numbers = numbers_of(description, config.target)
    resolved = config.resolve(numbers, description.kind)
    check_budget(resolved, numbers)
    read_init(resolved, numbers)
    check_folder(config.out)
    with _threads(config.threads):
        # Heavy imports: only now, when the cheap checks are passed.
        import torch

        from longrope_export.evaluation.documents import evaluation_rows, load_tokenizer
        from longrope_export.loader import load

        needed = config.documents + config.validation_documents
        rows = evaluation_rows(config.data, load_tokenizer(config.model), numbers.target, needed)
        config.out.mkdir(parents=True, exist_ok=True)
        model = load(config.model, dtype=getattr(torch, choose_dtype(config.dtype, description)))
        result = search_factors(
            model, numbers, [row.token_ids for row in rows], config, config.out / JOURNAL,
            kind=description.kind, fingerprint=fingerprint(config.model), progress=progress,
        )  # fmt: skip
    write_text(config.out / RECORD, result.scaling.to_json(), overwrite=True)
    return result


def numbers_of(description: ModelDescription, target: str) -> RopeNumbers:
    """The numbers of a described model and the length meant by `target` (`16384`, `32k` or `4x`).

    A model that carries one fixed scaling (YaRN, Llama-3, linear) is searched on top of it. Raises
    `UnsupportedModelError` for longrope factors that differ between short and long sequences, `ScalingError` when the
    window does not grow.
    """
    scaling = description.scaling
    if scaling is not None and (not scaling.is_static or scaling.long_start_tokens):
        raise UnsupportedModelError(
            f"{description.path} already carries longrope factors that differ for short and long sequences "
            f"({scaling.original_max_position_embeddings:,} to {scaling.max_position_embeddings:,} tokens): a second "
            "search on top of them is not supported; search on the model without them"
        )
    if description.rope_type == "dynamic":
        raise UnsupportedModelError(
            f"{description.path} carries dynamic NTK scaling, whose factors change with the length: take it out of the "
            "model's configuration first"
        )
    return RopeNumbers(
        rope_theta=description.rope_theta,
        rotary_dim=description.rotary_dim,
        window=description.window,
        target=resolve_target(target, description.window),
        base_factors=description.existing_factors or (),
        base_attention_factor=description.existing_attention_factor,
    )


def resolve_target(text: str, window: int) -> int:
    """Tokens meant by `16384`, `32k`, `1m` or `4x`; raises `LongRopeError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x|(\d+)([km]?)", text.strip().lower())
    if not match:
        raise LongRopeError(f"{text!r} is not a length; write 16384, 32k, 1m or 4x")
    if match[1]:
        return round(float(match[1]) * window)
    return int(match[2]) * {"": 1, "k": 1024, "m": 1024 * 1024}[match[3]]


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
