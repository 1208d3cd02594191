"""Which GGUF architecture a family is converted to, and what that architecture demands of names, shapes and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from longrope_export.converters.hf_config import LanguageModel
from longrope_export.errors import UnsupportedModelError
from longrope_export.formats.hf_config import count
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES, USED

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """One GGUF architecture.

    `fused`: q, k and v are one tensor, gate and up another. `floats`: key → (config.json's key, or "" for a constant;
    transformers' default, or the constant). `stand_in`: the family has another architecture of its own; `biases` are
    then the tensors of a layer that may have one, and `folded` says that the attention factor goes into the softmax
    scale. `phantom_layers`: blocks without tensors behind the last one. `untied`: the output needs a tensor of its own.
    """

    architecture: str
    fused: bool = False
    floats: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    stand_in: bool = False
    biases: tuple[str, ...] | None = None
    folded: bool = False
    phantom_layers: int = 0
    untied: bool = False

    @property
    def permuted(self) -> bool:
        """Whether rows of q and k stand in the order of NORM pairs."""
        return GGUF_ARCHITECTURES[self.architecture].pair_layout == "NORM"

    @property
    def takes_static_factors(self) -> bool:
        """Whether one set for every length has a tensor (`rope_freqs.weight`)."""
        return GGUF_ARCHITECTURES[self.architecture].static == USED


_LLAMA, _QWEN2, _PHI3 = Target("llama"), Target("qwen2"), Target("phi3", fused=True)
_GRANITE = Target(
    "granite",
    floats={
        "attention.scale": ("attention_multiplier", 1.0),
        "embedding_scale": ("embedding_multiplier", 1.0),
        "residual_scale": ("residual_multiplier", 1.0),
        "logit_scale": ("logits_scaling", 1.0),
    },
)
# family → the target of a model with factors, and of a plain one; llama.cpp's qwen2 has no place for factors
TARGETS: Mapping[str, tuple[Target, Target]] = {
    "llama": (_LLAMA, _LLAMA),
    "mistral": (_LLAMA, _LLAMA),
    "qwen2": (_LLAMA, _QWEN2),
    "phi3": (_PHI3, _PHI3),
    "granite": (_GRANITE, _GRANITE),
}
_AS_PHI3 = Target("phi3", fused=True, stand_in=True, biases=("attn_qkv",))
_AS_GRANITE = Target(
    "granite",
    floats=dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), ("", 1.0)),
    stand_in=True,
    folded=True,
)
# llama.cpp's step35 halves the rotated part of its layers with full attention, wants one sliding layer, which may be a
# block of the untouched multi-token head, and an output of its own (src/models/step35.cpp).
_AS_STEP35 = Target(
    "step35", stand_in=True, biases=("attn_q", "attn_k", "attn_v"), phantom_layers=1, untied=True
)  # fmt: skip
# family → other architectures that compute the same, by name
STAND_INS: Mapping[str, Mapping[str, Target]] = {
    "llama": {"phi3": _AS_PHI3, "granite": _AS_GRANITE},
    "mistral": {"phi3": _AS_PHI3, "granite": _AS_GRANITE},
    "qwen2": {"phi3": _AS_PHI3, "granite": _AS_GRANITE},
    "qwen3": {"step35": _AS_STEP35},
}


def layer_shapes(model: LanguageModel) -> dict[str, Shape]:
    """GGUF's name of each weight of a layer, as the family stores them → its shape as config.json says it."""
    hidden, middle = count(model.values, "hidden_size"), count(model.values, "intermediate_size")
    query, key = (model.head_dim * number for number in heads(model))
    shapes: dict[str, Shape] = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_output": (hidden, query)}
    if model.family.name == "phi3":
        return {**shapes, "attn_qkv": (query + 2 * key, hidden), "ffn_up": (2 * middle, hidden),
                "ffn_down": (hidden, middle)}  # fmt: skip
    if model.family.qk_norm:
        shapes |= {"attn_q_norm": (model.head_dim,), "attn_k_norm": (model.head_dim,)}
    return {**shapes, "attn_q": (query, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden),
            "ffn_gate": (middle, hidden), "ffn_up": (middle, hidden), "ffn_down": (hidden, middle)}  # fmt: skip


def target_for(model: LanguageModel, *, factors: bool, architecture: str | None = None) -> Target:
    """The target of `model`, which carries factors or not; `architecture` names another than the usual one.

    Raises `UnsupportedModelError` for other families, activations, or shapes that the target has no place for.
    """
    target = _named_target(model.family.name, factors, architecture)
    activation = model.values.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError(
            f"hidden_act is {str(activation)[:40]!r}; llama.cpp's {target.architecture} architecture has silu"
        )
    if target.fused and heads(model)[0] * model.head_dim != count(model.values, "hidden_size"):
        raise UnsupportedModelError(
            f"{heads(model)[0]} heads of {model.head_dim} values are not the width that llama.cpp's "
            f"{target.architecture} architecture demands"
        )
    return target


def _named_target(family: str, factors: bool, architecture: str | None) -> Target:
    own, others = TARGETS.get(family), STAND_INS.get(family, {})
    if own is not None and architecture in (None, own[0].architecture):
        return own[0] if factors or architecture else own[1]
    if architecture is not None and architecture in others:
        return others[architecture]
    known = [*([own[0].architecture] if own else []), *others]
    if architecture is not None and known:
        raise UnsupportedModelError(f"{family} cannot be written as {architecture}, only as {' or '.join(known)}")
    hint = f"; it can be written as {known[0]} (`longrope convert --as {known[0]}`), at a price" if known else ""
    raise UnsupportedModelError(
        f"{family} is not converted here, only {', '.join(TARGETS)}{hint}; "
        "convert it with llama.cpp's convert_hf_to_gguf.py and use `longrope patch`"
    )


def heads(model: LanguageModel) -> tuple[int, int]:
    """Attention heads, and heads of keys and values."""
    number = count(model.values, "num_attention_heads")
    grouped = model.values.get("num_key_value_heads") is not None
    return number, count(model.values, "num_key_value_heads") if grouped else number
