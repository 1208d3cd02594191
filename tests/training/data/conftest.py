"""Fixtures of the data tests: token stores of documents of given lengths, one character a token."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export.training.data.building import prepare
from longrope_export.training.data.shards import TokenStore


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., Path]:
    """`write(texts, name="data.jsonl", field="text")`: one document a line."""

    def write(texts: Sequence[str], name: str = "data.jsonl", field: str = "text") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts))
        return path

    return write


@pytest.fixture
def store_of(tmp_path: Path, write_jsonl: Callable[..., Path], tiny_tokenizer: Any) -> Callable[..., TokenStore]:
    """`store_of(lengths)`: documents of random letters with as many tokens, without BOS and EOS."""

    def make(lengths: Sequence[int], seed: int = 0) -> TokenStore:
        rng = np.random.default_rng(seed)
        texts = ["".join(rng.choice(list("abcdefghij"), length)) for length in lengths]
        return prepare([write_jsonl(texts)], tiny_tokenizer, tmp_path / "cache", bos="never", eos="never")

    return make
