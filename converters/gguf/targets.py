"""Which GGUF architecture a family is converted to, and what that architecture demands of names, shapes and keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from longrope_export.converters.hf_config import LanguageModel
from longrope_export.errors import UnsupportedModelError
from longrope_export.formats.hf_config import count
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Target:
    """One GGUF architecture. `fused`: q, k and v are one tensor, gate and up another. `floats`: key →
    (config.json's key, transformers' default).
    """

    architecture: str
    fused: bool = False
    floats: Mapping[str, tuple[str, float]] = field(default_factory=dict)

    @property
    def permuted(self) -> bool:
        """Whether rows of q and k stand in the order of NORM pairs."""
        return GGUF_ARCHITECTURES[self.architecture].pair_layout == "NORM"

    @property
    def takes_static_factors(self) -> bool:
        """Whether one set for every length has a tensor (`rope_freqs.weight`)."""
        return GGUF_ARCHITECTURES[self.architecture].static == "used"

    def layer_shapes(self, model: LanguageModel) -> dict[str, Shape]:
        """Name of each weight of a layer → its shape as config.json says it."""
        hidden, middle = count(model.values, "hidden_size"), count(model.values, "intermediate_size")
        query, key = (model.head_dim * number for number in heads(model))
        shapes: dict[str, Shape] = {"attn_norm": (hidden,), "ffn_norm": (hidden,), "attn_output": (hidden, query)}
        if self.fused:
            return {**shapes, "attn_qkv": (query + 2 * key, hidden), "ffn_up": (2 * middle, hidden),
                    "ffn_down": (hidden, middle)}  # fmt: skip
        return {**shapes, "attn_q": (query, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden),
                "ffn_gate": (middle, hidden), "ffn_up": (middle, hidden), "ffn_down": (hidden, middle)}  # fmt: skip


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


def target_for(model: LanguageModel, *, factors: bool) -> Target:
    """The target of `model`, which carries factors or not.

    Raises `UnsupportedModelError` for other families, activations, or shapes that the target has no place for.
    """
    pair = TARGETS.get(model.family.name)
    if pair is None:
        raise UnsupportedModelError(
            f"{model.family.name} is not converted here, only {', '.join(TARGETS)}; "
            "convert it with llama.cpp's convert_hf_to_gguf.py and use `longrope patch`"
        )
    target = pair[0] if factors else pair[1]
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


def heads(model: LanguageModel) -> tuple[int, int]:
    """Attention heads, and heads of keys and values."""
    number = count(model.values, "num_attention_heads")
    grouped = model.values.get("num_key_value_heads") is not None
    return number, count(model.values, "num_key_value_heads") if grouped else number
