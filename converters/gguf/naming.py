"""Which tensors of a model folder become which of a GGUF file: names, shapes and order, all checked before a weight is
read.
"""

from __future__ import annotations

from collections.abc import Mapping

from longrope_export.converters.gguf.targets import Shape, Target, layer_shapes
from longrope_export.converters.gguf.weights import StoredTensor
from longrope_export.converters.hf_config import LanguageModel
from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.formats.hf_config import count

Parts = tuple[StoredTensor, ...]
# fused tensor → the tensors whose rows it holds, in this order
_FUSED = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}


def named_tensors(stored: Mapping[str, StoredTensor], model: LanguageModel, target: Target) -> dict[str, Parts]:
    """GGUF names in llama.cpp's order → the tensors whose rows each holds; every needed one is there, and no unknown
    one is.

    Raises `InputFileError` when one is missing or of another shape, `UnsupportedModelError` when one has no place.
    """
    found = _family_names(stored, model, target)
    _check_shapes(found, model)
    named = _fused(found, model) if target.fused and model.family.name != "phi3" else _single(found)
    if target.untied and "output.weight" not in named:
        named["output.weight"] = named["token_embd.weight"]
    _check_biases(named, target)
    return dict(sorted(named.items(), key=lambda item: _order(item[0])))


def shape_of(parts: Parts) -> Shape:
    """Shape of the tensor that holds the rows of all `parts`."""
    first, *_ = (part.info.shape for part in parts)
    return (sum(part.info.shape[0] for part in parts), *first[1:])


def _family_names(stored: Mapping[str, StoredTensor], model: LanguageModel, target: Target) -> dict[str, StoredTensor]:
    from gguf.constants import MODEL_ARCH_NAMES
    from gguf.tensor_mapping import get_tensor_name_map

    layers = count(model.values, "num_hidden_layers")
    if layers * len(layer_shapes(model)) > len(stored):
        raise InputFileError(f"config.json says {layers:,} layers, but there are {len(stored):,} tensors only")
    own = model.family.gguf_architectures[0]
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == own)
    names = get_tensor_name_map(architecture, layers)
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if name.endswith("rotary_emb.inv_freq") or (_tied(model) and mapped == "output.weight"):
            continue
        if mapped is None:
            raise _no_place(name, target)
        found[mapped] = tensor
    return found


def _tied(model: LanguageModel) -> bool:
    return bool(model.values.get("tie_word_embeddings"))


def _check_shapes(found: Mapping[str, StoredTensor], model: LanguageModel) -> None:
    hidden, vocab = count(model.values, "hidden_size"), count(model.values, "vocab_size")
    wanted: dict[str, Shape] = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    if not _tied(model):
        wanted["output"] = (vocab, hidden)
    shapes = layer_shapes(model)
    for layer in range(count(model.values, "num_hidden_layers")):
        wanted |= {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}
    for name, tensor in found.items():
        stem, _, kind = name.rpartition(".")
        shape = wanted.get(stem, ()) if kind == "weight" else wanted.get(stem, ())[:1]
        if not shape or tensor.info.shape != shape:
            raise InputFileError(f"the tensor {name} has shape {tensor.info.shape}, config.json says {shape}")
    if missing := sorted(name for name in wanted if f"{name}.weight" not in found):
        raise InputFileError(f"the weights lack {missing[0]}.weight and {len(missing) - 1} more; download them again")


def _single(found: Mapping[str, StoredTensor]) -> dict[str, Parts]:
    return {name: (tensor,) for name, tensor in found.items()}


def _fused(found: Mapping[str, StoredTensor], model: LanguageModel) -> dict[str, Parts]:
    """`found` with the rows of some tensors of a layer in one."""
    named = _single(found)
    for layer in range(count(model.values, "num_hidden_layers")):
        for whole, pieces in _FUSED.items():
            for kind in ("weight", "bias"):
                names = [f"blk.{layer}.{piece}.{kind}" for piece in pieces]
                parts = tuple(found[name] for name in names if name in found)
                if len(parts) not in (0, len(names)):
                    raise InputFileError(f"the weights hold only some of {', '.join(names)}")
                for name in names:
                    named.pop(name, None)
                if parts:
                    named[f"blk.{layer}.{whole}.{kind}"] = parts
    return named


def _check_biases(named: Mapping[str, Parts], target: Target) -> None:
    if target.biases is None:
        return
    for name in named:
        stem, _, kind = name.rpartition(".")
        if kind == "bias" and stem.rpartition(".")[2] not in target.biases:
            raise _no_place(name, target)


def _no_place(name: str, target: Target) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the tensor {name[:200]!r} has no place in llama.cpp's {target.architecture} architecture"
    )


def _order(name: str) -> tuple[int, int, str]:
    parts = name.split(".")
    return (1, int(parts[1]), name) if parts[0] == "blk" else (0 if parts[0] == "token_embd" else 2, 0, name)
