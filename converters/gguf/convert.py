"""Converting a transformers folder (see `TARGETS`) to GGUF, with or without factors, tensor by tensor."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.converters.gguf.naming import Parts, named_tensors, shape_of
from longrope_export.converters.gguf.scaling_keys import scaling_entries, scaling_vectors
from longrope_export.converters.gguf.targets import Target, heads, target_for
from longrope_export.converters.gguf.tokenizer import GgufTokenizer, read_tokenizer
from longrope_export.converters.gguf.weights import (
    DTYPES,
    StoredTensor,
    encode,
    encoded_bytes,
    ggml_type,
    permute_pairs,
    read_stored,
    stored_tensors,
)
from longrope_export.converters.hf_config import LanguageModel, language_model
from longrope_export.converters.hf_folder import model_shards
from longrope_export.converters.lossy import gguf_losses, refuse_losses
from longrope_export.errors import UnsupportedModelError
from longrope_export.families import SLIDING
from longrope_export.files import atomic_output
from longrope_export.formats.gguf_scaling import STATIC_TENSOR
from longrope_export.formats.hf_config import count, positive, read_json
from longrope_export.formats.hf_scaling import scaling_from_config
from longrope_export.formats.records import CONFIG_FILE
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES
from longrope_export.rope.methods import Factors
from longrope_export.scaling import RopeScaling


def convert_to_gguf(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling | None = None,
    *,
    dtype: str = "f16",
    architecture: str | None = None,
    static: bool = False,
    allow_lossy: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write the model in `folder` as the GGUF `target`: matrices in `dtype` (f32, f16, bf16, q8_0), vectors
    in F32.

    `scaling` None keeps what config.json says, a static rope type (llama3, yarn, linear) as one set of factors for every
    length; `static` does so with the long factors of a record. `architecture` names one of llama.cpp's that stands for
    the family's own (see `STAND_INS`). Peak memory is a small multiple of the largest tensor. Returns what llama.cpp
    will not apply, which is refused unless `allow_lossy`. Raises `UnsupportedModelError` for other families,
    tokenizers or tensors that llama.cpp's architecture lacks, `InputFileError`, `ScalingError`,
    `LossyTargetError`, and `OutputError`.
    """
    plan = plan_conversion(
        folder, scaling, dtype=dtype, architecture=architecture, static=static, allow_lossy=allow_lossy
    )
    write_conversion(plan, target, overwrite=overwrite)
    return plan.losses


# Any number will do: no layer of the model slides.
_PHANTOM_WINDOW = 128
_PHI3, _PHI3_TOKENS = re.compile(r"phi-?3", re.IGNORECASE), ("</s>", "<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Conversion:
    """Everything that a conversion needs, read and checked; only the weights are still on disk."""

    name: str
    target: Target
    model: LanguageModel
    tokenizer: GgufTokenizer
    tensors: Mapping[str, Parts]
    scaling: RopeScaling | None
    one_set: bool
    static: Factors | None
    dtype: str
    losses: list[str]


def plan_conversion(
    folder: str | os.PathLike[str],
    scaling: RopeScaling | None = None,
    *,
    dtype: str = "f16",
    architecture: str | None = None,
    static: bool = False,
    allow_lossy: bool = False,
) -> Conversion:
    """Read and check all that `convert_to_gguf` needs, without writing; raises as it does."""
    source = Path(folder)
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"the dtype {dtype!r} is not written; choose one of {', '.join(DTYPES)}")
    config = read_json(source / CONFIG_FILE)
    model = language_model(config)
    target_for(model, factors=False, architecture=architecture)
    scaling = scaling_from_config(config) if scaling is None else scaling
    own = None if scaling else model.static_factors()
    target = target_for(model, factors=scaling is not None or own is not None, architecture=architecture)
    _check_form(target, model, scaling, own, static)
    losses = refuse_losses("a GGUF", _losses(model, scaling, static), allow_lossy=allow_lossy)
    # Before the tokenizer, whose table has a row for every token that the config claims.
    tensors = named_tensors(stored_tensors(model_shards(source)), model, target)
    tokenizer = read_tokenizer(source, count(model.values, "vocab_size"), config)
    return Conversion(
        name=_model_name(source.resolve().name, tokenizer),
        target=target,
        model=model,
        tokenizer=tokenizer,
        tensors=tensors,
        scaling=scaling,
        one_set=static,
        static=own,
        dtype=dtype,
        losses=losses + tokenizer.losses,
    )


def write_conversion(plan: Conversion, target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the planned GGUF; raises `OutputError`, and `NumericalError` when float16 cannot hold a
    weight.
    """
    with atomic_output(target, overwrite=overwrite) as file:
        _write(Path(file.name), plan)


def _model_name(name: str, tokenizer: GgufTokenizer) -> str:
    """llama.cpp takes Phi-3's tokens for granted in a model of that name, and dies without them (llama-vocab.cpp)."""
    return name if set(_PHI3_TOKENS) <= set(tokenizer.tokens) else _PHI3.sub("phi", name)


def _check_form(
    target: Target, model: LanguageModel, scaling: RopeScaling | None, own: Factors | None, static: bool
) -> None:
    if (static or own is not None) and not target.takes_static_factors:
        kind = "one set for every length" if static else model.rope.rope_type
        raise UnsupportedModelError(f"llama.cpp's {target.architecture} architecture has no place for {kind}")
    if (static or target.stand_in) and scaling is None:
        raise UnsupportedModelError("one set, or another architecture, is for a model with factors; give a record")


def _losses(model: LanguageModel, scaling: RopeScaling | None, static: bool) -> list[str]:
    losses = []
    if scaling is not None:
        model.check_record(scaling)
        losses = gguf_losses(scaling, static=static) + model.window_losses(scaling) + model.composition_losses(scaling)
    layers = count(model.values, "num_hidden_layers")
    types = model.values.get("layer_types") or model.family.layer_types(model.values, layers)
    window = model.values.get("sliding_window") if SLIDING in types else None
    longest = scaling.max_position_embeddings if scaling else model.values["max_position_embeddings"]
    if isinstance(window, int) and window < longest:
        losses.append(f"llama.cpp will attend to all tokens, not to a sliding window of {window}")
    return losses


def _write(path: Path, plan: Conversion) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, plan.target.architecture)
    try:
        _add_model_keys(writer, plan)
        _add_rope_keys(writer, plan)
        _add_tokenizer_keys(writer, plan.tokenizer)
        factors = _factor_tensors(plan)
        _add_tensor_infos(writer, plan.tensors, factors, plan.dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, parts in plan.tensors.items():
            kind = ggml_type(shape_of(parts), plan.dtype)
            rows = [encode(_values(name, part, plan), kind, name) for part in parts]
            writer.write_tensor_data(np.concatenate(rows) if len(rows) > 1 else rows[0])
        for values in factors.values():
            writer.write_tensor_data(values)
    except OSError as error:
        if error.errno is None:  # numpy's `tofile` says only how many values it wrote
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        writer.close()


def _add_model_keys(writer: Any, plan: Conversion) -> None:
    model, values, target = plan.model, plan.model.values, plan.target
    query_heads, kv_heads = heads(model)
    scale = GGUF_ARCHITECTURES[target.architecture].dimension_count_scale
    writer.add_type("model")
    writer.add_name(plan.name)
    writer.add_file_type(DTYPES[plan.dtype][1])
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


def _factor_tensors(plan: Conversion) -> dict[str, Any]:
    if plan.scaling is not None:
        vectors = scaling_vectors(plan.scaling, static=plan.one_set)
        return {name: np.asarray(factors, np.float32) for name, factors in vectors.items()}
    return {} if plan.static is None else {STATIC_TENSOR: np.asarray(plan.static.factors, np.float32)}


def _add_tensor_infos(writer: Any, tensors: Mapping[str, Parts], factors: Mapping[str, Any], dtype: str) -> None:
    from gguf.constants import GGMLQuantizationType

    for name, parts in tensors.items():
        shape = shape_of(parts)
        kind = ggml_type(shape, dtype)
        size = encoded_bytes(shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, GGMLQuantizationType[kind])
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)


def _values(name: str, tensor: StoredTensor, plan: Conversion) -> Any:
    values = read_stored(tensor)
    query_heads, kv_heads = heads(plan.model)
    number = {"attn_q": query_heads, "attn_k": kv_heads}.get(name.split(".")[-2])
    return permute_pairs(values, number) if number and plan.target.permuted else values
