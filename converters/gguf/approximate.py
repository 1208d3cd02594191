"""The scaling keys that come nearest to a record's long factors, for architectures that take no factor tensor.

Every architecture of llama.cpp reads a base, a linear factor and YaRN's keys; each is one curve of divisors, and the
factors of a search are another. What remains is reported in numbers; it is a loss, and never chosen unasked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from longrope_export.converters.gguf.checks import check_shape, composition_losses, window_losses
from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.converters.gguf.scaling_keys import SCALING_TENSORS, is_removed
from longrope_export.converters.lossy import gguf_losses, refuse_losses
from longrope_export.errors import UnsupportedModelError
from longrope_export.formats.gguf_header import GgufHeader
from longrope_export.formats.gguf_scaling import FOLDED_KEY, RECORD_KEY
from longrope_export.gguf_architectures import gguf_architecture
from longrope_export.rope.formulas import yarn_attention_factor
from longrope_export.rope.hf_types import factors_from_rope_parameters
from longrope_export.scaling import RopeScaling

# The record that such a file stands for; it does not apply it, so it is not the file's own.
APPROXIMATED_KEY = "longrope_export.approximates"
_YARN_STEPS = 400

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Approximation:
    """Keys (without the architecture's name) and the divisors that llama.cpp makes of them, [rotary_dim // 2]."""

    method: str
    keys: Mapping[str, str | float]
    divisors: Array

    def error(self, scaling: RopeScaling) -> Array:
        """How far each frequency is from the record's, in natural logarithms."""
        return np.asarray(np.abs(np.log(self.divisors) - np.log(np.asarray(scaling.long_factor))))


def approximation(method: str, scaling: RopeScaling) -> Approximation:
    """The keys of `method` (yarn, linear, base, or auto: the nearest) that fit the long factors best, by the mean square
    of the logarithms.
    """
    if method != "auto":
        return _METHODS[method](scaling)
    return min((fit(scaling) for fit in _METHODS.values()), key=lambda found: _mean_square(found, scaling))


def plan_approximation(
    header: GgufHeader, scaling: RopeScaling, method: str, *, allow_lossy: bool
) -> tuple[GgufChanges, list[str]]:
    """The changes that give the file the keys of `method`, and what is lost, which must be allowed.

    Raises `UnsupportedModelError` for a file that does not rotate, `ScalingError` for a record of another model,
    `LossyTargetError`.
    """
    architecture = str(header.get("general.architecture"))
    if gguf_architecture(architecture).pair_layout not in ("NORM", "NEOX"):
        raise UnsupportedModelError(f"{header.path}: architecture {architecture} has no plain RoPE to scale")
    check_shape(header, scaling)
    found = approximation(method, scaling)
    losses = [_loss(found, scaling), *gguf_losses(scaling, static=True)]
    losses += window_losses(header, scaling) + composition_losses(header, scaling)
    refuse_losses(str(header.path), losses, allow_lossy=allow_lossy)
    entries: dict[str, str | int | float] = {
        f"{architecture}.context_length": scaling.max_position_embeddings,
        **{f"{architecture}.{key}": value for key, value in found.keys.items()},
        f"{architecture}.rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        APPROXIMATED_KEY: scaling.to_json(),
    }
    owned = {f"{architecture}.rope.scaling.{key}" for key in ("type", "factor", "attn_factor")} | {
        RECORD_KEY,
        FOLDED_KEY,
    }
    removed = frozenset(key for key in header.metadata if is_removed(architecture, key)) | owned
    return GgufChanges(entries=entries, removed=removed - entries.keys(), dropped=frozenset(SCALING_TENSORS)), losses


def _loss(found: Approximation, scaling: RopeScaling) -> str:
    error = np.expm1(found.error(scaling))
    return (
        f"llama.cpp will scale by {found.method} instead of the record's factors: its frequencies are off by "
        f"{error.mean():.1%} on average and by {error.max():.1%} at most (pair {int(error.argmax())})"
    )


def _mean_square(found: Approximation, scaling: RopeScaling) -> float:
    return float(np.square(found.error(scaling)).mean())


def _linear(scaling: RopeScaling) -> Approximation:
    factor = float(np.exp(np.log(np.asarray(scaling.long_factor)).mean()))
    keys: dict[str, str | float] = {
        "rope.freq_base": scaling.rope_theta, "rope.scaling.type": "linear", "rope.scaling.factor": factor,
        "rope.scaling.attn_factor": scaling.long_attention_factor,
    }  # fmt: skip
    return Approximation("linear", keys, np.full(scaling.rotary_dim // 2, factor))


def _base(scaling: RopeScaling) -> Approximation:
    # another base θ' divides the frequency of pair i by (θ'/θ)^(2i/d)
    exponents = np.arange(scaling.rotary_dim // 2) * 2.0 / scaling.rotary_dim
    slope = float(exponents @ np.log(np.asarray(scaling.long_factor)) / max(exponents @ exponents, 1e-9))
    keys: dict[str, str | float] = {
        "rope.freq_base": float(scaling.rope_theta * np.exp(slope)),
        "rope.scaling.attn_factor": scaling.long_attention_factor,
    }
    return Approximation("base", keys, np.exp(slope * exponents))


def _yarn(scaling: RopeScaling) -> Approximation:
    greatest = max(2.0, *scaling.long_factor)
    found = (_yarn_with(scaling, float(factor)) for factor in np.geomspace(1.0, 2.0 * greatest, _YARN_STEPS))
    return min(found, key=lambda fit: _mean_square(fit, scaling))


def _yarn_with(scaling: RopeScaling, factor: float) -> Approximation:
    original = scaling.original_max_position_embeddings
    parameters = {
        "rope_type": "yarn", "rope_theta": scaling.rope_theta, "factor": factor,
        "original_max_position_embeddings": original,
    }  # fmt: skip
    made = factors_from_rope_parameters(parameters, rotary_dim=scaling.rotary_dim, max_position_embeddings=original)
    keys: dict[str, str | float] = {
        "rope.freq_base": scaling.rope_theta, "rope.scaling.type": "yarn", "rope.scaling.factor": factor,
        # llama.cpp multiplies YaRN's own attention factor by the key's
        "rope.scaling.attn_factor": scaling.long_attention_factor / yarn_attention_factor(factor),
    }  # fmt: skip
    return Approximation("yarn", keys, np.asarray(made.factors, np.float64))


_METHODS: Mapping[str, Callable[[RopeScaling], Approximation]] = MappingProxyType(
    {"yarn": _yarn, "linear": _linear, "base": _base}
)
