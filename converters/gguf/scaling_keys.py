"""Which keys and tensors of a GGUF file carry a `RopeScaling`, as llama.cpp reads them.

llama.cpp picks the long factors where the allocated context exceeds `original_context_length`, and multiplies
cos and sin by `attn_factor` in both regimes; `rope.scaling.factor` would interpolate a second time on top of
the factors (llama.cpp `src/llama-model.cpp`, load_hparams and get_rope_factors).
"""

from __future__ import annotations

from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.converters.lossy import one_set_record
from longrope_export.formats.gguf_header import GgufHeader
from longrope_export.formats.gguf_scaling import FOLDED_KEY, LONG_TENSOR, RECORD_KEY, SHORT_TENSOR, STATIC_TENSOR
from longrope_export.scaling import Factors, RopeScaling

SCALING_TENSORS = (LONG_TENSOR, SHORT_TENSOR, STATIC_TENSOR)

# Read by llama.cpp whatever the scaling type is, or left over from another method.
_REMOVED = ("rope.scaling.factor", "rope.scale_linear", "rope.scaling.alpha")
_REMOVED_PREFIX = "rope.scaling.yarn_"


def scaling_entries(
    architecture: str, scaling: RopeScaling, *, static: bool = False, folded: bool = False
) -> dict[str, str | int | float]:
    """Keys and values, in the order in which they are written, that make llama.cpp apply `scaling`.

    `static`: as one set for every length, which knows no switch. `folded`: the attention factor is in the softmax
    scale (granite's `attention.scale`), where a context shift does not apply it again.
    """
    kind = {} if static else {f"{architecture}.rope.scaling.type": "longrope"}
    return {
        f"{architecture}.context_length": scaling.max_position_embeddings,
        f"{architecture}.rope.freq_base": scaling.rope_theta,
        **kind,
        f"{architecture}.rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        **_attention_entries(architecture, scaling, folded),
        RECORD_KEY: (one_set_record(scaling) if static else scaling).to_json(),
    }


def _attention_entries(architecture: str, scaling: RopeScaling, folded: bool) -> dict[str, float]:
    factor = scaling.long_attention_factor
    if not folded:
        return {f"{architecture}.rope.scaling.attn_factor": factor}
    # q and k would each carry the factor; a model in this disguise rotates whole heads
    return {f"{architecture}.attention.scale": factor**2 / scaling.rotary_dim**0.5, FOLDED_KEY: factor}


def scaling_vectors(scaling: RopeScaling, *, static: bool = False) -> dict[str, Factors]:
    """Name → divisors of the factor tensors."""
    if static:
        return {STATIC_TENSOR: scaling.long_factor}
    return {LONG_TENSOR: scaling.long_factor, SHORT_TENSOR: scaling.short_factor}


def scaling_changes(
    header: GgufHeader, scaling: RopeScaling, *, static: bool = False, folded: bool = False
) -> GgufChanges:
    """What makes `scaling` the only one in the GGUF file of `header`; `static` and `folded` as in `scaling_entries`."""
    architecture = str(header.get("general.architecture"))
    folded = folded or FOLDED_KEY in header.metadata
    entries = scaling_entries(architecture, scaling, static=static, folded=folded)
    owned = {f"{architecture}.rope.scaling.type", f"{architecture}.rope.scaling.attn_factor", FOLDED_KEY}
    return GgufChanges(
        entries=entries,
        removed=frozenset(key for key in header.metadata if is_removed(architecture, key)) | owned - entries.keys(),
        dropped=frozenset(SCALING_TENSORS),
        vectors=scaling_vectors(scaling, static=static),
    )


def is_removed(architecture: str, key: str) -> bool:
    """Whether `key` must not stand beside the factors."""
    if not key.startswith(f"{architecture}."):
        return False
    name = key[len(architecture) + 1 :]
    return name in _REMOVED or name.startswith(_REMOVED_PREFIX)
