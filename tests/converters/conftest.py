"""Fixtures of the converters' tests: GGUF files of a few kilobytes, records for them, a tiny model with a tokenizer."""

from __future__ import annotations

import logging
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling

ROTARY_DIM = 16
THETA = 10000.0


@pytest.fixture(scope="session")
def record() -> Callable[..., RopeScaling]:
    """Builder of records for the GGUF files of `gguf_file` (window 512, 8 pairs, theta 10,000)."""

    def build(rotary_dim: int = ROTARY_DIM, **changes: Any) -> RopeScaling:
        values: dict[str, Any] = {
            "rope_theta": THETA,
            "rotary_dim": rotary_dim,
            "original_max_position_embeddings": 512,
            "max_position_embeddings": 2048,
            "long_factor": np.linspace(1.0, 8.0, rotary_dim // 2).tolist(),
            "short_factor": np.linspace(1.0, 1.3, rotary_dim // 2).tolist(),
            "long_attention_factor": 1.1,
            "short_attention_factor": 1.1,
            "provenance": {"method": "test", "seed": 3},
        }
        return RopeScaling(**{**values, **changes})

    return build


@pytest.fixture
def gguf_file(tmp_path: Path) -> Callable[..., Path]:
    """Builder of a GGUF with three odd-sized tensors; `keys` are set beside (or instead of) the usual ones."""
    import gguf

    def build(
        name: str = "model.gguf",
        *,
        architecture: str = "llama",
        keys: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Any] | None = None,
        alignment: int | None = None,
    ) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        if alignment:
            writer.add_custom_alignment(alignment)
        defaults = {
            f"{architecture}.context_length": 512,
            f"{architecture}.rope.dimension_count": ROTARY_DIM,
            f"{architecture}.rope.freq_base": THETA,
        }
        for key, value in {**defaults, **(keys or {})}.items():
            if value is not None:
                add = {
                    int: writer.add_uint32,
                    float: writer.add_float32,
                    str: writer.add_string,
                    list: writer.add_array,
                }
                add[type(value)](key, value)
        writer.add_token_list(["<s>", "</s>", "ä\u2028", "word" * 30])
        writer.add_array("general.tags", ["one", "two"])
        generator = np.random.default_rng(0)
        shapes = {"token_embd.weight": (4, 5), "blk.0.attn_norm.weight": (7,), "output.weight": (4, 5)}
        for tensor, shape in shapes.items():
            writer.add_tensor(tensor, generator.standard_normal(shape).astype(np.float32))
            if tensor == "token_embd.weight":
                for extra, values in (tensors or {}).items():
                    writer.add_tensor(extra, np.asarray(values, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return build


def stdlib_files(count: int) -> list[Path]:
    """The first modules of Python's standard library, by name."""
    return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:count]


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Source files of the standard library, and texts on which tokenizers tend to differ."""
    odd = [
        "héllo Wörld 12345 １２３ ²³ ½ 你好世界 🎉👍🏽\u200d  \t\n\r\n  x\u00a0y\u3000z ''s 'll I'LL  don't can'T",
        "  leading", "trailing  ", "\n\n\n", "\t\t x", "٣٤٥ 1234567890 3.14", "\u0001\x7f", "e\u0301 é ﬁ Å K",
        "</s >x<s >",
    ]  # fmt: skip
    return [path.read_text(encoding="utf-8", errors="replace") for path in stdlib_files(10)] + odd


@pytest.fixture(scope="session")
def digit_tokenizer() -> Any:
    """A byte-level BPE of 600 tokens with single digits (llama.cpp's `smollm`), trained on the standard library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path) for path in stdlib_files(12)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def small_config() -> dict[str, Any]:
    """Sizes of `small_llama`: window 512, 2 layers, 4 heads of 32 and 2 key heads, 608 embeddings."""
    return {
        "vocab_size": 608, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
        "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory, digit_tokenizer: Any, small_config: dict[str, Any]) -> Path:
    """A random Llama of 0.4 M parameters with `digit_tokenizer`, as a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("small") / "llama"
    LlamaForCausalLM(LlamaConfig(**small_config)).save_pretrained(folder)
    digit_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def quiet() -> Iterator[None]:
    """No log lines of transformers."""
    logging.disable(logging.WARNING)  # transformers warns about short_mscale and long_mscale
    yield
    logging.disable(logging.NOTSET)
