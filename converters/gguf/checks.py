"""Whether a record may be embedded in a GGUF file: refusals that save the user from a file that runs
wrongly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from longrope_export.converters.lossy import gguf_losses, refuse_losses, undone_losses
from longrope_export.errors import InputFileError, ScalingError, UnsupportedModelError
from longrope_export.formats.gguf_header import GgufHeader
from longrope_export.formats.gguf_scaling import RECORD_KEY, STATIC_TENSOR, gguf_rotary_dim
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES, USED, gguf_architecture
from longrope_export.scaling import RopeScaling, to_float32

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

LLAMA_CPP_DEFAULT_THETA = 10000.0
_SCALING_KEYS = ("rope.scaling.factor", "rope.scale_linear")


def check_patchable(header: GgufHeader, scaling: RopeScaling, *, allow_lossy: bool, static: bool = False) -> list[str]:
    """Refuse what cannot work; return the losses that `allow_lossy` permits.

    `static`: the factors are to stand in the file as one set for every length.
    """
    architecture = _architecture(header)
    _check_unsplit(header)
    check_architecture(str(header.path), architecture, static=static)
    check_shape(header, scaling)
    losses = gguf_losses(scaling, static=static) + window_losses(header, scaling) + composition_losses(header, scaling)
    return refuse_losses(str(header.path), losses, allow_lossy=allow_lossy)


def check_shape(header: GgufHeader, scaling: RopeScaling) -> None:
    """Raise `ScalingError` when the record has another number of factors or another base than the file."""
    architecture = _architecture(header)
    _check_rotary_dim(header, architecture, scaling)
    _check_theta(header, architecture, scaling)


def existing_factors(header: GgufHeader) -> npt.NDArray[np.float64] | None:
    """Divisors that the file applies at every length already (Llama-3's `rope_freqs.weight`, linear and YaRN keys), or
    None.

    float64 of shape [rotary_dim // 2]. A record for this file holds total divisors: these times its own.
    """
    if header.tensor(STATIC_TENSOR) is None:
        return _factors_of_keys(header)
    import numpy as np

    from longrope_export.formats.gguf_tensors import read_tensor

    with np.errstate(invalid="ignore"):  # a stranger's NaN; `composition_losses` refuses it
        return read_tensor(header, STATIC_TENSOR).astype("float64").reshape(-1)


def _factors_of_keys(header: GgufHeader) -> npt.NDArray[np.float64] | None:
    architecture = header.get("general.architecture")
    if not any(f"{architecture}.{key}" in header.metadata for key in _SCALING_KEYS):
        return None  # the usual case, which needs no numpy
    from longrope_export.formats.gguf_description import static_key_factors

    return static_key_factors(header, _rotary_dim(header))


def _architecture(header: GgufHeader) -> str:
    architecture = header.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise InputFileError(f"{header.path} has no general.architecture; it is not a model that llama.cpp can run")
    if f"{architecture}.context_length" not in header.metadata or not header.all_tensors:
        raise InputFileError(
            f"{header.path} is not a language model: it has no {architecture}.context_length or no tensors"
        )
    return architecture


def _check_unsplit(header: GgufHeader) -> None:
    count = header.get("split.count", 0)
    if isinstance(count, int) and count > 1 and not header.others:
        raise UnsupportedModelError(
            f"{header.path} is one of {count} shards; "
            "merge them first: llama-gguf-split --merge FIRST-SHARD MERGED.gguf"
        )


def check_architecture(name: str, architecture: str, *, static: bool = False) -> None:
    """Raise `UnsupportedModelError` unless llama.cpp rotates `architecture` with long and short factors (`static`: with
    one set for every length).
    """
    row = gguf_architecture(architecture)
    if not row.has_rope:
        raise UnsupportedModelError(f"{name} has no rotary position embeddings (architecture {architecture})")
    if static and row.static != USED:
        raise UnsupportedModelError(f"{name}: llama.cpp's {architecture} architecture has no place for {STATIC_TENSOR}")
    if not static and not row.honours_factors:
        honouring = ", ".join(sorted(entry.name for entry in GGUF_ARCHITECTURES.values() if entry.honours_factors))
        raise UnsupportedModelError(
            f"{name}: llama.cpp applies no long and short factors in architecture {architecture}; "
            f"it does in {honouring}"
        )


def _check_rotary_dim(header: GgufHeader, architecture: str, scaling: RopeScaling) -> None:
    rotary_dim = _rotary_dim(header)
    if rotary_dim != scaling.rotary_dim:
        raise ScalingError(
            f"the record has {scaling.rotary_dim // 2} factors, {header.path} needs {rotary_dim // 2} "
            f"({architecture}.rope.dimension_count is {rotary_dim}); it was made for another model"
        )


def _rotary_dim(header: GgufHeader) -> int:
    """Rotated dimensions per head: the key, or what llama.cpp derives when the key is absent."""
    architecture = header.get("general.architecture")
    keys = ("attention.key_length", "embedding_length", "attention.head_count")
    head_dim, width, heads = (_integer(header, f"{architecture}.{key}") for key in keys)
    rotary_dim = gguf_rotary_dim(header, head_dim or (width // heads if width and heads else 0))
    if not rotary_dim:
        raise InputFileError(f"{header.path} does not say how many dimensions it rotates; factors cannot be checked")
    return rotary_dim


def _integer(header: GgufHeader, key: str) -> int | None:
    value = header.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _check_theta(header: GgufHeader, architecture: str, scaling: RopeScaling) -> None:
    theta = header.get(f"{architecture}.rope.freq_base", LLAMA_CPP_DEFAULT_THETA)
    if not isinstance(theta, float) or not 0 < theta < 1e38:
        raise InputFileError(f"{header.path} has the impossible rope.freq_base {theta!r}")
    if to_float32(theta) != scaling.rope_theta:
        raise ScalingError(
            f"the record is for rope_theta {scaling.rope_theta:g}, {header.path} has {theta:g}; "
            "it was made for another model"
        )


def window_losses(header: GgufHeader, scaling: RopeScaling) -> list[str]:
    """The record's L must be a length that the file knows: its window, or the one it was extended from."""
    architecture = header.get("general.architecture")
    window = _integer(header, f"{architecture}.context_length")
    original = _integer(header, f"{architecture}.rope.scaling.original_context_length") or window
    if scaling.original_max_position_embeddings in (window, original):
        return []
    if _converted_without_factors(header) and window == scaling.max_position_embeddings:
        return []
    return [f"the record extends a window of {scaling.original_max_position_embeddings}, the file has {original}"]


def _converted_without_factors(header: GgufHeader) -> bool:
    """Whether llama.cpp's converter made the file of an extended folder: of longrope it writes the type's name only."""
    architecture = header.get("general.architecture")
    original = f"{architecture}.rope.scaling.original_context_length"
    return header.get(f"{architecture}.rope.scaling.type") == "longrope" and original not in header.metadata


def composition_losses(header: GgufHeader, scaling: RopeScaling) -> list[str]:
    """Total divisors cannot undo half of what the file's own static factors do; then they were not
    composed.
    """
    if RECORD_KEY in header.metadata:  # what stands there is a record's total, not the model's own
        return []
    existing = existing_factors(header)
    if existing is None:
        return []
    import numpy as np

    if existing.shape != (scaling.rotary_dim // 2,) or not np.all(np.isfinite(existing) & (existing > 0)):
        raise InputFileError(f"{header.path} has a damaged {STATIC_TENSOR}; download or convert it again")
    source = STATIC_TENSOR if header.tensor(STATIC_TENSOR) else "rope.scaling"
    return undone_losses(existing, scaling, source)
