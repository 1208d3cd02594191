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

from longrope_export.converters.gguf.scaling_keys import scaling_entries
from longrope_export.converters.gguf.targets import Shape, Target, heads, target_for
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
from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.families import SLIDING
from longrope_export.files import atomic_output
from longrope_export.formats.gguf_scaling import LONG_TENSOR, SHORT_TENSOR, STATIC_TENSOR
from longrope_export.formats.hf_config import count, positive, read_json
from longrope_export.formats.hf_scaling import scaling_from_config
from longrope_export.formats.records import CONFIG_FILE
from longrope_export.rope.methods import Factors
from longrope_export.scaling import RopeScaling


def convert_to_gguf(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling | None = None,
    *,
    dtype: str = "f16",
    allow_lossy: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write the model in `folder` as the GGUF `target`: matrices in `dtype` (f32, f16, bf16, q8_0), vectors
    in F32.

    `scaling` None keeps what config.json says, a static rope type (llama3, yarn, linear) as one set of
    factors for every length. Peak memory is a small multiple of the largest tensor. Returns what llama.cpp
    will not apply, which is refused unless `allow_lossy`. Raises `UnsupportedModelError` for other families,
    tokenizers or tensors that llama.cpp's architecture lacks, `InputFileError`, `ScalingError`,
    `LossyTargetError`, and `OutputError`.
    """
    plan = plan_conversion(folder, scaling, dtype=dtype, allow_lossy=allow_lossy)
    write_conversion(plan, target, overwrite=overwrite)
    return plan.losses


_PHI3, _PHI3_TOKENS = re.compile(r"phi-?3", re.IGNORECASE), ("</s>", "<unk>", "<s>", "<|endoftext|>")


@dataclass(frozen=True)
class Conversion:
    """Everything that a conversion needs, read and checked; only the weights are still on disk."""

    name: str
    target: Target
    model: LanguageModel
    tokenizer: GgufTokenizer
    tensors: Mapping[str, StoredTensor]
    scaling: RopeScaling | None
    static: Factors | None
    dtype: str
    losses: list[str]


def plan_conversion(
    folder: str | os.PathLike[str],
    scaling: RopeScaling | None = None,
    *,
    dtype: str = "f16",
    allow_lossy: bool = False,
) -> Conversion:
    """Read and check all that `convert_to_gguf` needs, without writing; raises as it does."""
    source = Path(folder)
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"the dtype {dtype!r} is not written; choose one of {', '.join(DTYPES)}")
    config = read_json(source / CONFIG_FILE)
    model = language_model(config)
    target_for(model, factors=False)
    scaling = scaling_from_config(config) if scaling is None else scaling
    static = None if scaling else model.static_factors()
    target = target_for(model, factors=scaling is not None or static is not None)
    if static is not None and not target.takes_static_factors:
        raise UnsupportedModelError(
            f"llama.cpp's {target.architecture} architecture has no place for {model.rope.rope_type}"
        )
    losses = refuse_losses("a GGUF", _losses(model, scaling), allow_lossy=allow_lossy)
    # Before the tokenizer, whose table has a row for every token that the config claims.
    tensors = _named_tensors(stored_tensors(model_shards(source)), model, target)
    tokenizer = read_tokenizer(source, count(model.values, "vocab_size"), config)
    return Conversion(
        name=_model_name(source.resolve().name, tokenizer),
        target=target,
        model=model,
        tokenizer=tokenizer,
        tensors=tensors,
        scaling=scaling,
        static=static,
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


def _losses(model: LanguageModel, scaling: RopeScaling | None) -> list[str]:
    losses = []
    if scaling is not None:
        model.check_record(scaling)
        losses = gguf_losses(scaling) + model.window_losses(scaling) + model.composition_losses(scaling)
    layers = count(model.values, "num_hidden_layers")
    types = model.values.get("layer_types") or model.family.layer_types(model.values, layers)
    window = model.values.get("sliding_window") if SLIDING in types else None
    longest = scaling.max_position_embeddings if scaling else model.values["max_position_embeddings"]
    if isinstance(window, int) and window < longest:
        losses.append(f"llama.cpp will attend to all tokens, not to a sliding window of {window}")
    return losses


def _named_tensors(stored: Mapping[str, StoredTensor], model: LanguageModel, target: Target) -> dict[str, StoredTensor]:
    """GGUF names → tensors in llama.cpp's order; every needed one is there, and no unknown one is."""
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    layers = count(model.values, "num_hidden_layers")
    shapes = target.layer_shapes(model)
    if layers * len(shapes) > len(stored):
        raise InputFileError(f"config.json says {layers:,} layers, but there are {len(stored):,} tensors only")
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == target.architecture)
    names = get_tensor_name_map(architecture, layers)
    tied = bool(model.values.get("tie_word_embeddings"))
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name.endswith("rotary_emb.inv_freq") or (tied and mapped == "output.weight"):
            continue
        if mapped is None:
            raise UnsupportedModelError(
                f"the tensor {name[:200]!r} has no place in llama.cpp's {target.architecture} architecture"
            )
        found[mapped] = tensor
    _check_shapes(found, model, shapes, tied)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _check_shapes(
    found: Mapping[str, StoredTensor], model: LanguageModel, layer_shapes: Mapping[str, Shape], tied: bool
) -> None:
    hidden, vocab = count(model.values, "hidden_size"), count(model.values, "vocab_size")
    wanted: dict[str, Shape] = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    if not tied:
        wanted["output"] = (vocab, hidden)
    for layer in range(count(model.values, "num_hidden_layers")):
        wanted |= {f"blk.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    for name, tensor in found.items():
        stem, _, kind = name.rpartition(".")
        shape = wanted.get(stem, ()) if kind == "weight" else wanted.get(stem, ())[:1]
        if not shape or tensor.info.shape != shape:
            raise InputFileError(f"the tensor {name} has shape {tensor.info.shape}, config.json says {shape}")
    if missing := sorted(name for name in wanted if f"{name}.weight" not in found):
        raise InputFileError(f"the weights lack {missing[0]}.weight and {len(missing) - 1} more; download them again")


def _order(name: str) -> tuple[int, int, str]:
    parts = name.split(".")
    return (1, int(parts[1]), name) if parts[0] == "blk" else (0 if parts[0] == "token_embd" else 2, 0, name)


def _write(path: Path, plan: Conversion) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, plan.target.architecture)
    try:
        _add_model_keys(writer, plan)
        _add_rope_keys(writer, plan)
        _add_tokenizer_keys(writer, plan.tokenizer)
        factors = _factor_tensors(plan.scaling, plan.static)
        _add_tensor_infos(writer, plan.tensors, factors, plan.dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in plan.tensors.items():
            kind = ggml_type(tensor.info.shape, plan.dtype)
            writer.write_tensor_data(encode(_values(name, tensor, plan), kind, name))
        for values in factors.values():
            writer.write_tensor_data(values)
    except OSError as error:
        if error.errno is None:  # numpy's `tofile` says only how many values it wrote
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise
    finally:
        writer.close()


def _add_model_keys(writer: Any, plan: Conversion) -> None:
    model, values, (query_heads, kv_heads) = plan.model, plan.model.values, heads(plan.model)
    writer.add_type("model")
    writer.add_name(plan.name)
    writer.add_file_type(DTYPES[plan.dtype][1])
    writer.add_quantization_version(2)
    writer.add_block_count(count(values, "num_hidden_layers"))
    writer.add_embedding_length(count(values, "hidden_size"))
    writer.add_feed_forward_length(count(values, "intermediate_size"))
    writer.add_head_count(query_heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(positive({"rms_norm_eps": 1e-6, **values}, "rms_norm_eps"))
    writer.add_vocab_size(count(values, "vocab_size"))
    writer.add_rope_dimension_count(model.rotary_dim)
    for key, (name, default) in plan.target.floats.items():
        writer.add_float32(f"{plan.target.architecture}.{key}", positive({name: default, **values}, name))
    if plan.target.fused:
        writer.add_sliding_window(values.get("sliding_window") or 0)  # phi3 builds of 2024 refuse a file without it


def _add_rope_keys(writer: Any, plan: Conversion) -> None:
    if plan.scaling is None:
        writer.add_context_length(count(plan.model.values, "max_position_embeddings"))
        writer.add_rope_freq_base(plan.model.rope.rope_theta)
        if plan.static is not None and plan.static.attention_factor != 1.0:
            writer.add_rope_scaling_attn_factors(plan.static.attention_factor)
        return
    for key, value in scaling_entries(plan.target.architecture, plan.scaling).items():
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


def _factor_tensors(scaling: RopeScaling | None, static: Factors | None) -> dict[str, Any]:
    if scaling is not None:
        pairs = {LONG_TENSOR: scaling.long_factor, SHORT_TENSOR: scaling.short_factor}
        return {name: np.asarray(factors, np.float32) for name, factors in pairs.items()}
    return {} if static is None else {STATIC_TENSOR: np.asarray(static.factors, np.float32)}


def _add_tensor_infos(writer: Any, tensors: Mapping[str, StoredTensor], factors: Mapping[str, Any], dtype: str) -> None:
    from gguf.constants import GGMLQuantizationType

    for name, tensor in tensors.items():
        kind = ggml_type(tensor.info.shape, dtype)
        size = encoded_bytes(tensor.info.shape, kind)
        writer.add_tensor_info(name, tensor.info.shape, np.dtype(np.float32), size, GGMLQuantizationType[kind])
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)


def _values(name: str, tensor: StoredTensor, plan: Conversion) -> Any:
    values = read_stored(tensor)
    query_heads, kv_heads = heads(plan.model)
    number = {"attn_q": query_heads, "attn_k": kv_heads}.get(name.split(".")[-2])
    return permute_pairs(values, number) if number and plan.target.permuted else values
