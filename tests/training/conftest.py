"""Fixtures of the training room."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from finetune_case import Case, write_case


@pytest.fixture(scope="session")
def case(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A tiny model, its factors for 32 → 128 tokens, and texts."""
    return write_case(tmp_path_factory.mktemp("finetune"), tiny_llama)


@pytest.fixture(scope="session", autouse=True)
def few_objects_to_collect() -> None:
    """transformers' Trainer collects garbage at the start of every run, which the imported libraries make slow."""
    import transformers  # noqa: F401

    gc.collect()
    gc.freeze()
