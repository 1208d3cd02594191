"""Fixtures of the search room: a tiny model in memory, a tiny model folder with a tokenizer, and texts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from longrope_export.search.space import RopeNumbers

WINDOW, TARGET = 32, 128


@dataclass(frozen=True)
class Tiny:
    """A random model, its numbers for 32 → 128 tokens, and rows of 128 token ids."""

    model: Any
    numbers: RopeNumbers
    rows: list[npt.NDArray[np.int64]]


@pytest.fixture(scope="session")
def tiny(tiny_llama: Path) -> Tiny:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    generator = np.random.default_rng(0)
    rows = [np.concatenate([[1], generator.integers(3, 97, TARGET - 1)]) for _ in range(8)]
    return Tiny(model, RopeNumbers(rope_theta=10000.0, rotary_dim=32, window=WINDOW, target=TARGET), rows)


@pytest.fixture(scope="session")
def tiny_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a tokenizer of single characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("searched") / "model"
    shutil.copytree(tiny_llama, folder)
    letters = [chr(code) for code in range(32, 32 + 94)]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 characters of repeating prose."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    words = np.random.default_rng(1).choice(["the", "quick", "window", "of", "tokens", "grows", "by", "four"], 500)
    path.write_text(" ".join(words)[:2000])
    return path
