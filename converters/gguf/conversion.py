"""Planning a conversion: everything of a transformers folder that a GGUF file needs, read and checked; no weight is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longrope_export.converters.gguf.encodings import DTYPES
from longrope_export.converters.gguf.naming import Parts, named_tensors
from longrope_export.converters.gguf.targets import Target, target_for
from longrope_export.converters.gguf.tokenizer import GgufTokenizer, read_tokenizer
from longrope_export.converters.gguf.weights import stored_tensors
from longrope_export.converters.hf_config import LanguageModel, language_model
from longrope_export.converters.hf_folder import model_shards
from longrope_export.converters.lossy import gguf_losses, refuse_losses
from longrope_export.errors import UnsupportedModelError
from longrope_export.families import SLIDING
from longrope_export.formats.hf_config import count, read_json
from longrope_export.formats.hf_scaling import scaling_from_config
from longrope_export.formats.records import CONFIG_FILE
from longrope_export.rope.methods import Factors
from longrope_export.scaling import RopeScaling

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
