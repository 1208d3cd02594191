"""The demo model's tokenizer: byte-level BPE with single digits, llama.cpp's pre-tokenizer `smollm`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from longrope_export.files import write_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOS = "<|endoftext|>"
BOS_ID = 0


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """Learn `vocabulary` tokens from `texts`; the token 0 is `<|endoftext|>`, which opens every encoded text.

    The split is SmolLM2's: every `\\p{N}` alone, then GPT-2's expression within the rest. llama.cpp calls it `smollm`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, window: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` as transformers 4 and 5 read them."""
    config = {
        "add_bos_token": True,
        "add_prefix_space": False,
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": BOS,
        "model_max_length": window,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=False) + "\n", overwrite=True)
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n", overwrite=True)
