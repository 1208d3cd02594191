"""The texts of a run: tokenised once, divided into rows to train on and held-out documents to measure on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import LongRopeError, TextTooShortError
from longrope_export.evaluation.documents import load_tokenizer
from longrope_export.files import output_errors
from longrope_export.training.config import FinetuneConfig
from longrope_export.training.data.building import prepare
from longrope_export.training.data.holdout import Split, hold_out
from longrope_export.training.data.rows import RowPlan
from longrope_export.training.data.shards import TokenStore
from longrope_export.training.inputs import Inputs
from longrope_export.training.processes import first_on_main

TOKENS = "tokens"
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Rows to train on, held-out token rows (int64, all `held_length` tokens), and what identifies the training data."""

    plan: RowPlan
    held: list[npt.NDArray[np.int64]]
    held_length: int
    identity: Mapping[str, Any]
    tokenizer: Any
    remarks: tuple[str, ...]


def read_corpus(config: FinetuneConfig, inputs: Inputs, work: Path, progress: Progress) -> Corpus:
    """Tokenise what is not tokenised yet (in the first process), and plan the rows of the run.

    Raises `TextTooShortError` when no document is as long as a row, `InputFileError` for texts that cannot be read, and
    `LongRopeError` when the tokenizer is another model's.
    """
    tokenizer = load_tokenizer(config.model)
    folder = config.cache or work / TOKENS
    first_on_main(lambda: _prepare_all(config, tokenizer, folder, work, progress))
    store = _store(config.data, config, tokenizer, folder)
    _check_vocabulary(store, inputs)
    source, split, length = _held_out(config, inputs, store, tokenizer, folder)
    held = [source.read(int(number), 0, length) for number in split.held]
    plan = RowPlan(store, inputs.rows, documents=split.training, rows=config.steps * config.batch)
    identity = {**store.identity, "tokens": store.data_hash, "documents": len(split.training)}
    remarks = (*_measured(config, inputs, len(held), length), *_unused(plan))
    return Corpus(plan, held, length, identity, tokenizer, remarks)


def _prepare_all(config: FinetuneConfig, tokenizer: Any, folder: Path, work: Path, progress: Progress) -> None:
    for paths in filter(None, (config.data, config.eval_data)):
        _store(paths, config, tokenizer, folder, progress)
    # From here on the output folder is this run's, also when it is killed before its first checkpoint.
    with output_errors(work):
        work.mkdir(parents=True, exist_ok=True)


def _store(
    paths: tuple[Path, ...], config: FinetuneConfig, tokenizer: Any, folder: Path, progress: Progress | None = None
) -> TokenStore:
    report = (lambda done, everything: progress(done, everything, "tokenising")) if progress else None
    return prepare(paths, tokenizer, folder, field=config.field, bos=config.bos, eos=config.eos, report=report)


def _check_vocabulary(store: TokenStore, inputs: Inputs) -> None:
    if store.record["vocabulary"] > inputs.description.vocab:
        raise LongRopeError(
            f"the tokenizer of {inputs.description.path} knows {store.record['vocabulary']:,} tokens and the model "
            f"{inputs.description.vocab:,}: they do not belong together"
        )


def _held_out(
    config: FinetuneConfig, inputs: Inputs, store: TokenStore, tokenizer: Any, folder: Path
) -> tuple[TokenStore, Split, int]:
    """The store of the held-out documents, their numbers, and how many tokens of each are measured."""
    everything = np.arange(len(store))
    if config.eval_data:
        other = _store(config.eval_data, config, tokenizer, folder)
        for length in (inputs.target, inputs.window):
            chosen = np.flatnonzero(other.lengths >= length)[: config.held_documents]
            if len(chosen):
                return other, Split(everything, chosen), length
        raise TextTooShortError(
            f"--eval-data has no document of {inputs.window:,} tokens (the longest has {other.lengths.max():,}); give "
            "longer texts"
        )
    if config.eval_documents is not None:
        length = inputs.target if (store.lengths >= inputs.target).any() else inputs.window
        return store, hold_out(store, config.eval_documents, length=length, seed=config.seed), length
    for length in (inputs.target, inputs.window):
        # Without being asked, at most an eighth of the long documents.
        count = min(config.held_documents, int((store.lengths >= length).sum()) // 8)
        if count:
            return store, hold_out(store, count, length=length, seed=config.seed), length
    return store, Split(everything, everything[:0]), inputs.window


def _unused(plan: RowPlan) -> list[str]:
    """Documents that are too short for a long row and too long for a short one."""
    count = len(plan.unused)
    if not count:
        return []
    tokens = int(plan.store.lengths[plan.unused].sum())
    rest = f"; those of up to {plan.window:,} tokens are packed" if plan.options.long_share < 1 else ""
    return [
        f"{count:,} of the documents ({tokens:,} tokens) are not trained on: long rows take documents of {plan.span:,} tokens "
        f"or more{rest} (--length, --cut-longer)"
    ]


def _measured(config: FinetuneConfig, inputs: Inputs, held: int, length: int) -> list[str]:
    if not held and config.eval_documents != 0:
        return ["too few long documents to hold some out: no perplexities; give --eval-data or --eval-documents"]
    if held and length < inputs.target:
        return [f"no held-out document has {inputs.target:,} tokens: perplexity is measured at {length:,} only"]
    return []
