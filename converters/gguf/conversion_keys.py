"""The keys of a converted GGUF file: the model's sizes, its rotation, its tokenizer, and the factors' tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from longrope_export.converters.gguf.conversion import Conversion
from longrope_export.converters.gguf.encodings import DTYPES
from longrope_export.converters.gguf.scaling_keys import scaling_entries, scaling_vectors
from longrope_export.converters.gguf.targets import heads
from longrope_export.converters.gguf.tokenizer import GgufTokenizer
from longrope_export.formats.gguf_scaling import STATIC_TENSOR
from longrope_export.formats.hf_config import count, positive
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES

# Any number will do: no layer of the model slides.
_PHANTOM_WINDOW = 128


def add_keys(writer: Any, plan: Conversion) -> None:
    """Hand every key of the planned file to gguf's `GGUFWriter`."""
    _add_model_keys(writer, plan)
    _add_rope_keys(writer, plan)
    _add_tokenizer_keys(writer, plan.tokenizer)


def _add_model_keys(writer: Any, plan: Conversion) -> None:
    model, values, target = plan.model, plan.model.values, plan.target
    query_heads, kv_heads = heads(model)
    scale = GGUF_ARCHITECTURES[target.architecture].dimension_count_scale
    writer.add_type("model")
    writer.add_name(plan.name)
    writer.add_file_type(DTYPES[plan.dtype].file_type)
    writer.add_quantization_version(2)
    writer.add_block_count(count(values, "num_hidden_layers") + target.phantom_layers)
    writer.add_embedding_length(count(values, "hidden_size"))
    writer.add_feed_forward_length(count(values, "intermediate_size"))
    writer.add_head_count(query_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(positive({"rms_norm_eps": 1e-6, **values}, "rms_norm_eps"))
    writer.add_vocab_size(count(values, "vocab_size"))
    writer.add_rope_dimension_count(model.rotary_dim * scale)
    for key, (name, default) in target.floats.items():
        value = positive({name: default, **values}, name) if name else default
        writer.add_float32(f"{target.architecture}.{key}", value)
    if target.fused:  # phi3 builds of 2024 refuse a file without it
        writer.add_sliding_window((not target.stand_in and values.get("sliding_window")) or 0)
    if target.phantom_layers:
        _add_phantom_keys(writer, plan)


def _add_phantom_keys(writer: Any, plan: Conversion) -> None:
    """The blocks without tensors are a multi-token head that is not there, and llama.cpp's one sliding layer."""
    layers, phantom, name = count(plan.model.values, "num_hidden_layers"), plan.target.phantom_layers, "step35"
    writer.add_uint32(f"{name}.nextn_predict_layers", phantom)
    writer.add_uint32(f"{name}.attention.sliding_window", _PHANTOM_WINDOW)
    writer.add_array(f"{name}.attention.sliding_window_pattern", [False] * layers + [True] * phantom)
    writer.add_uint32(f"{name}.expert_feed_forward_length", count(plan.model.values, "intermediate_size"))


def _add_rope_keys(writer: Any, plan: Conversion) -> None:
    if plan.scaling is None:
        writer.add_context_length(count(plan.model.values, "max_position_embeddings"))
        writer.add_rope_freq_base(plan.model.rope.rope_theta)
        if plan.static is not None and plan.static.attention_factor != 1.0:
            writer.add_rope_scaling_attn_factors(plan.static.attention_factor)
        return
    target = plan.target
    entries = scaling_entries(target.architecture, plan.scaling, static=plan.one_set, folded=target.folded)
    for key, value in entries.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(key, value)


def _add_tokenizer_keys(writer: Any, tokenizer: GgufTokenizer) -> None:
    writer.add_tokenizer_model(tokenizer.model)
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    if tokenizer.scores:
        writer.add_token_scores(tokenizer.scores)
    if tokenizer.merges:
        writer.add_token_merges(tokenizer.merges)
    for name, index in tokenizer.special.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    writer.add_add_space_prefix(tokenizer.add_space_prefix)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def factor_tensors(plan: Conversion) -> dict[str, Any]:
    """Name → float32 divisors of the tensors that carry the factors."""
    if plan.scaling is not None:
        vectors = scaling_vectors(plan.scaling, static=plan.one_set)
        return {name: np.asarray(factors, np.float32) for name, factors in vectors.items()}
    return {} if plan.static is None else {STATIC_TENSOR: np.asarray(plan.static.factors, np.float32)}
