"""GGUF files that transformers' own import lacks (granite) or reads wrongly (llama with biases, phi3), as its models.

transformers 5.23 imports an architecture `llama` as LlamaForCausalLM without biases and drops those that the file has;
a Qwen2 under that name (the form in which llama.cpp applies factors to it) would compute something else. For phi3 it
ignores `rope.dimension_count`, and rotates whole heads where the model rotates a part.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.description import ModelDescription
from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.formats.gguf_header import FLOAT32, GgufHeader
from longrope_export.formats.gguf_scaling import FOLDED_KEY
from longrope_export.formats.gguf_tensors import read_tensor

GRANITE, PHI3 = "granite", "phi3"
_PHI3_PADDING = 32000  # the token that transformers takes for padding in every phi3
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_IN_LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up",
}  # fmt: skip
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
# config.json's key → GGUF's, and what llama.cpp takes when it is absent (None: it refuses the file)
_GRANITE_SCALES = {
    "attention_multiplier": ("attention.scale", 0.0),
    "embedding_multiplier": ("embedding_scale", 1.0),
    "residual_multiplier": ("residual_scale", 1.0),
    "logits_scaling": ("logit_scale", None),
}
_OPTIONS = {"dtype", "torch_dtype", "attn_implementation"}


def needs_own_import(header: GgufHeader) -> bool:
    """Whether transformers would refuse the file, drop its biases, or rotate too much of each head."""
    architecture = header.get("general.architecture")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    small = tokens is not None and tokens.array_length <= _PHI3_PADDING
    if architecture == PHI3 and (small or header.tensor("blk.0.attn_qkv.bias") is not None):
        return True
    if architecture == PHI3:
        keys = ("rope.dimension_count", "embedding_length", "attention.head_count")
        rotated, width, heads = (header.get(f"{PHI3}.{key}") for key in keys)
        return (
            isinstance(rotated, int) and isinstance(width, int) and isinstance(heads, int) and rotated * heads != width
        )
    return architecture == GRANITE or (architecture == "llama" and header.tensor("blk.0.attn_q.bias") is not None)


def transformers_config(header: GgufHeader, model: ModelDescription) -> dict[str, Any]:
    """The config.json of the model in the file, with plain RoPE and the window that the file declares."""
    architecture = model.architecture
    biased = header.tensor("blk.0.attn_q.bias") is not None
    own_name = not biased or header.tensor("blk.0.attn_output.bias") is not None
    if FOLDED_KEY in header.metadata:  # a llama or qwen2 in granite's place
        family = "llama" if own_name else "qwen2"
    else:
        family = architecture if own_name or architecture != "llama" else "qwen2"
    values: dict[str, Any] = {
        "model_type": family, "hidden_size": model.hidden, "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads, "head_dim": model.head_dim,
        "vocab_size": model.vocab, "max_position_embeddings": model.window,
        "intermediate_size": _count(header, f"{architecture}.feed_forward_length"),
        "rms_norm_eps": _real(header, f"{architecture}.attention.layer_norm_rms_epsilon", None),
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": header.tensor("output.weight") is None,
    }  # fmt: skip
    values |= _tokens(header, model)
    if family == PHI3:
        part = {"partial_rotary_factor": model.rotary_dim / model.head_dim}
        rope = {"rope_parameters": {**values["rope_parameters"], **part}}
        return {**values, **part, **rope, "pad_token_id": None, "original_max_position_embeddings": model.window}
    if family != "qwen2":
        values |= {"attention_bias": biased, "mlp_bias": header.tensor("blk.0.ffn_up.bias") is not None}
    if family == GRANITE:
        for name, (key, default) in _GRANITE_SCALES.items():
            values[name] = _real(header, f"{architecture}.{key}", default)
        values["attention_multiplier"] = values["attention_multiplier"] or model.head_dim**-0.5
    return values


def _tokens(header: GgufHeader, model: ModelDescription) -> dict[str, int | None]:
    found = {f"{name}_token_id": header.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    return {name: token if isinstance(token, int) and token < model.vocab else None for name, token in found.items()}


def load_gguf_model(header: GgufHeader, description: ModelDescription, **options: Any) -> Any:
    """The transformers model in the file, dequantised; `options`: dtype, attn_implementation.

    Raises `InputFileError` when a tensor is missing or of another shape than the keys say,
    `UnsupportedModelError` for a tensor or an option that has no place.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if unknown := sorted(set(options) - _OPTIONS):
        raise UnsupportedModelError(f"{', '.join(unknown)}: not an option for this GGUF file; use a model folder")
    dtype = options.pop("dtype", options.pop("torch_dtype", "float32"))
    dtype = getattr(torch, "float32" if dtype == "auto" else dtype) if isinstance(dtype, str) else dtype
    if header.tensor(f"blk.{description.layers - 1}.attn_norm.weight") is None:
        raise InputFileError(f"{header.path} lacks layers: its keys say {description.layers}")
    config = AutoConfig.for_model(**transformers_config(header, description))
    with torch.device("meta"):  # shapes only: the keys may promise more than there is
        names = _check_parameters(header, AutoModelForCausalLM.from_config(config))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = _in_transformers_order(read_tensor(header, names[name]), names[name], description)
            parameter.copy_(torch.from_numpy(values))
    return model


def _check_parameters(header: GgufHeader, model: Any) -> dict[str, str]:
    """The model's parameters and the tensors that hold them; every one is there and fits, and none is left over."""
    names = {name: gguf_name(name) for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        info = header.tensor(names[name])
        if info is None or tuple(reversed(info.shape)) != tuple(parameter.shape):
            found = (
                "missing" if info is None else f"of shape {tuple(reversed(info.shape))}, not {tuple(parameter.shape)}"
            )
            raise InputFileError(f"{header.path}: the tensor {names[name]} is {found}")
    for info in header.all_tensors:
        if info.name not in names.values() and not info.name.startswith("rope_f"):
            raise UnsupportedModelError(f"{header.path}: the tensor {info.name!r} has no place in transformers' model")
    return names


def gguf_name(name: str) -> str:
    """GGUF's name of a transformers parameter of a llama-like model; raises `UnsupportedModelError` for others."""
    stem, _, kind = name.rpartition(".")
    match = _LAYER.fullmatch(name)
    if match and match[2] in _IN_LAYER:
        return f"blk.{match[1]}.{_IN_LAYER[match[2]]}.{kind}"
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{kind}"
    raise UnsupportedModelError(f"the parameter {name} has no name in GGUF")


def _in_transformers_order(
    values: npt.NDArray[np.float32], name: str, model: ModelDescription
) -> npt.NDArray[np.float32]:
    """Rows of q and k from llama.cpp's pairs (2i, 2i + 1) to transformers' (i, i + d/2), per head."""
    heads = {"attn_q": model.heads, "attn_k": model.kv_heads}.get(name.split(".")[-2])
    if not heads:
        return values
    split = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _count(header: GgufHeader, key: str) -> int:
    value = header.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 1 << 31:
        raise InputFileError(f"{header.path}: the key {key} is {str(value)[:40]}; it must be a whole number above 0")
    return value


def _real(header: GgufHeader, key: str, default: float | None) -> float:
    entry = header.metadata.get(key)
    if entry is None and default is not None:
        return default
    if entry is None or entry.value_type != FLOAT32 or not 0 <= entry.value < 1e30:
        raise InputFileError(f"{header.path}: the key {key} is missing or no FLOAT32 from 0")
    return float(entry.value)
