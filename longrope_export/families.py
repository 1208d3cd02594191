"""Model families as one table: where RoPE sits in each, and what its GGUF architecture does with factors.

Adding a family is adding a row; its test builds a tiny model of it with transformers and compares. GGUF
facts are those of llama.cpp 0c1e5709 (`src/llama-model.cpp`, `src/models/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from longrope_export.errors import UnsupportedModelError
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES, GgufArchitecture, gguf_architecture
from longrope_export.scaling import MAX_ROTARY_DIM

__all__ = [
    "FAMILIES", "FULL", "GGUF_ARCHITECTURES", "SLIDING", "Family", "GgufArchitecture", "family_for_config",
    "family_for_gguf", "gguf_architecture", "head_dim", "rotary_dim",
]  # fmt: skip

FULL = "full_attention"
SLIDING = "sliding_attention"

LayerTypes = Callable[[Mapping[str, Any], int], tuple[str, ...]]


def _window_everywhere(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    return (SLIDING if config.get("sliding_window") else FULL,) * layers


def _window_in_upper_layers(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    active = config.get("use_sliding_window") and config.get("sliding_window") is not None
    first = config["max_window_layers"] if active else layers
    return tuple(SLIDING if layer >= first else FULL for layer in range(layers))


def _every_second_full(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    return tuple(SLIDING if (layer + 1) % 2 else FULL for layer in range(layers))


def _pattern(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    period = config["sliding_window_pattern"]
    return tuple(SLIDING if (layer + 1) % period else FULL for layer in range(layers))


def _all_full(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    return (FULL,) * layers


@dataclass(frozen=True, kw_only=True)
class Family:
    """One row: how transformers builds the family's RoPE, and which GGUF architectures hold it.

    `rotary_path` is the attribute path of the rotary module in the causal language model,
    `multimodal_rotary_path` in the class that wraps it. `pair_layout` says which values of a head GGUF
    rotates together: NORM pairs (2i, 2i+1) with q and k rows permuted by the converter, NEOX pairs (i,
    i+d/2) in transformers' order. `defaults` are the config values that transformers assumes for absent
    keys. `nested_rope` families keep one rope_parameters per layer type and ignore a flat longrope one
    silently. `reads_layer_types`: an explicit layer_types list in the config counts.
    """

    name: str
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    pair_layout: str
    defaults: Mapping[str, Any]
    rotary_path: str = "model.rotary_emb"
    multimodal_rotary_path: str | None = None
    partial_rotary: bool = False
    nested_rope: bool = False
    local_theta: float | None = None
    top_level_original: bool = False
    qk_norm: bool = False
    reads_layer_types: bool = False
    layer_types: LayerTypes = field(default=_all_full)


def _defaults(
    *, hidden: int, heads: int, kv_heads: int | None, layers: int, window: int, vocab: int, **more: Any
) -> Mapping[str, Any]:
    sizes = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_hidden_layers": layers,
        "max_position_embeddings": window,
        "vocab_size": vocab,
    }
    return MappingProxyType({"rope_theta": 10000.0, **sizes, **more})


_QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

_ROWS = (
    Family(
        name="llama",
        model_types=("llama",),
        architectures=("LlamaForCausalLM",),
        gguf_architectures=("llama",),
        pair_layout="NORM",
        defaults=_defaults(hidden=4096, heads=32, kv_heads=None, layers=32, window=2048, vocab=32000),
    ),
    # llama.cpp's converter writes MistralForCausalLM as llama too: such a GGUF shows the row above.
    Family(
        name="mistral",
        model_types=("mistral",),
        architectures=("MistralForCausalLM",),
        gguf_architectures=("llama", "mistral3"),
        pair_layout="NORM",
        defaults=_defaults(
            hidden=4096, heads=32, kv_heads=8, layers=32, window=131072, vocab=32000, sliding_window=4096
        ),
        layer_types=_window_everywhere,
    ),
    Family(
        name="qwen2",
        model_types=("qwen2",),
        architectures=("Qwen2ForCausalLM",),
        gguf_architectures=("qwen2",),
        pair_layout="NEOX",
        defaults=_defaults(hidden=4096, heads=32, kv_heads=32, layers=32, window=32768, vocab=151936, **_QWEN),
        reads_layer_types=True,
        layer_types=_window_in_upper_layers,
    ),
    Family(
        name="qwen3",
        model_types=("qwen3",),
        architectures=("Qwen3ForCausalLM",),
        gguf_architectures=("qwen3",),
        pair_layout="NEOX",
        defaults=_defaults(
            hidden=4096, heads=32, kv_heads=32, layers=32, window=32768, vocab=151936, head_dim=128, **_QWEN
        ),
        qk_norm=True,
        reads_layer_types=True,
        layer_types=_window_in_upper_layers,
    ),
    Family(
        name="phi3",
        model_types=("phi3",),
        architectures=("Phi3ForCausalLM",),
        gguf_architectures=("phi3",),
        pair_layout="NEOX",
        defaults=_defaults(
            hidden=3072,
            heads=32,
            kv_heads=None,
            layers=32,
            window=4096,
            vocab=32064,
            sliding_window=None,
            original_max_position_embeddings=4096,
        ),
        partial_rotary=True,
        top_level_original=True,
        layer_types=_window_everywhere,
    ),
    Family(
        name="granite",
        model_types=("granite",),
        architectures=("GraniteForCausalLM",),
        gguf_architectures=("granite",),
        pair_layout="NORM",
        defaults=_defaults(hidden=4096, heads=32, kv_heads=None, layers=32, window=2048, vocab=32000),
    ),
    Family(
        name="gemma2",
        model_types=("gemma2",),
        architectures=("Gemma2ForCausalLM",),
        gguf_architectures=("gemma2",),
        pair_layout="NEOX",
        defaults=_defaults(
            hidden=2304, heads=8, kv_heads=4, layers=26, window=8192, vocab=256000, head_dim=256, sliding_window=4096
        ),
        reads_layer_types=True,
        layer_types=_every_second_full,
    ),
    Family(
        name="gemma3",
        model_types=("gemma3_text", "gemma3"),
        architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
        gguf_architectures=("gemma3",),
        pair_layout="NEOX",
        defaults=_defaults(
            hidden=2304,
            heads=8,
            kv_heads=4,
            layers=26,
            window=131072,
            vocab=262208,
            head_dim=256,
            sliding_window=4096,
            sliding_window_pattern=6,
            rope_theta=1_000_000.0,
        ),
        multimodal_rotary_path="model.language_model.rotary_emb",
        nested_rope=True,
        local_theta=10000.0,
        qk_norm=True,
        reads_layer_types=True,
        layer_types=_pattern,
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({row.name: row for row in _ROWS})


def family_for_config(model_type: Any) -> Family:
    """The row for a config.json's `model_type`; raises `UnsupportedModelError` naming the known ones."""
    for row in _ROWS:
        if model_type in row.model_types:
            return row
    known = ", ".join(sorted(name for row in _ROWS for name in row.model_types))
    raise UnsupportedModelError(f"the model type {str(model_type)[:80]!r} is not known here; known are: {known}")


def family_for_gguf(architecture: str) -> Family | None:
    """The row whose models llama.cpp's converter writes as `architecture`, or None where there is no row."""
    return next((row for row in _ROWS if architecture in row.gguf_architectures), None)


def head_dim(family: Family, config: Mapping[str, Any]) -> int:
    """Values per attention head: an explicit head_dim, else hidden_size // num_attention_heads, as
    transformers does.
    """
    explicit = config.get("head_dim", family.defaults.get("head_dim"))
    return int(explicit or config["hidden_size"] // config["num_attention_heads"])


def rotary_dim(family: Family, head_dim: int, partial_rotary_factor: float = 1.0) -> int:
    """Rotated values per head: int(head_dim · partial_rotary_factor).

    Raises `UnsupportedModelError` when the family rotates whole heads only, or the result is odd or not in
    2..head_dim.
    """
    if partial_rotary_factor != 1.0 and not family.partial_rotary:
        raise UnsupportedModelError(
            f"partial_rotary_factor is {partial_rotary_factor}, but {family.name} rotates whole "
            "heads; correct config.json"
        )
    dimensions = int(head_dim * partial_rotary_factor)
    if not 2 <= dimensions <= min(head_dim, MAX_ROTARY_DIM) or dimensions % 2:
        raise UnsupportedModelError(
            f"{dimensions} of {head_dim} values per head would be rotated; "
            f"the number must be even and from 2 to {min(head_dim, MAX_ROTARY_DIM)}"
        )
    return dimensions
