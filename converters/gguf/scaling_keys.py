"""Which keys and tensors of a GGUF file carry a `RopeScaling`, as llama.cpp reads them.

llama.cpp picks the long factors where the allocated context exceeds `original_context_length`, and multiplies
cos and sin by `attn_factor` in both regimes; `rope.scaling.factor` would interpolate a second time on top of
the factors (llama.cpp `src/llama-model.cpp`, load_hparams and get_rope_factors).
"""

from __future__ import annotations

from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.formats.gguf_header import GgufHeader
from longrope_export.formats.gguf_scaling import LONG_TENSOR, RECORD_KEY, SHORT_TENSOR, STATIC_TENSOR
from longrope_export.scaling import RopeScaling

SCALING_TENSORS = (LONG_TENSOR, SHORT_TENSOR, STATIC_TENSOR)

# Read by llama.cpp whatever the scaling type is, or left over from another method.
_REMOVED = ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.alpha")
_REMOVED_PREFIX = "rope.scaling.yarn_"


def scaling_entries(architecture: str, scaling: RopeScaling) -> dict[str, str | int | float]:
    """Keys and values, in the order in which they are written, that make llama.cpp apply `scaling`."""
    return {
        f"{architecture}.context_length": scaling.max_position_embeddings,
        f"{architecture}.rope.freq_base": scaling.rope_theta,
        f"{architecture}.rope.scaling.type": "longrope",
        f"{architecture}.rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        f"{architecture}.rope.scaling.attn_factor": scaling.long_attention_factor,
        RECORD_KEY: scaling.to_json(),
    }


def scaling_changes(header: GgufHeader, scaling: RopeScaling) -> GgufChanges:
    """What makes `scaling` the only one in the GGUF file of `header`."""
    architecture = str(header.get("general.architecture"))
    return GgufChanges(
        entries=scaling_entries(architecture, scaling),
        removed=frozenset(key for key in header.metadata if is_removed(architecture, key)),
        dropped=frozenset(SCALING_TENSORS),
        vectors={LONG_TENSOR: scaling.long_factor, SHORT_TENSOR: scaling.short_factor},
    )


def is_removed(architecture: str, key: str) -> bool:
    """Whether `key` must not stand beside the factors."""
    if not key.startswith(f"{architecture}."):
        return False
    name = key[len(architecture) + 1 :]
    return name in _REMOVED or name.startswith(_REMOVED_PREFIX)
