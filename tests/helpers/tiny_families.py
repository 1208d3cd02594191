"""A tiny random model of each family that training attention serves."""

from __future__ import annotations

from typing import Any

TINY = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.15,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

# Windows of 7 tokens, where the family can have one.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 1},
    "phi3": {"sliding_window": 7},
    "granite": {},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
}


def tiny_family(model_type: str, **changes: Any) -> Any:
    """The family's causal language model in float64, two layers of 6 heads (3 for keys) of 8 values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(TINY | FAMILIES.get(model_type, {}) | changes))
    return AutoModelForCausalLM.from_config(config).double().eval()
