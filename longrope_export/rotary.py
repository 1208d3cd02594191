"""The reference rotary embedding: exact angles, start tokens, one set for a batch or one for each row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from longrope_export.errors import LongRopeError, ScalingError, UnsupportedModelError
from longrope_export.families import FULL, Family, family_for_config

Angles = Literal["exact", "float32"]


def rotation(
    position_ids: Tensor,
    inverse_frequencies: Tensor,
    *,
    attention_factor: float | Tensor,
    start_tokens: int | Tensor = 0,
    original_inverse_frequencies: Tensor | None = None,
    angles: Angles = "exact",
) -> tuple[Tensor, Tensor]:
    """Cos and sin, float32 [B, S, D], of each position, multiplied by the attention factor.

    `position_ids` is integer [B, S]; `inverse_frequencies` (radians a token) is [D/2], [B, D/2] for one set a
    row, or [B, S, D/2]. `attention_factor` and `start_tokens` are numbers or tensors [], [B] or [B, S];
    positions below `start_tokens` (n̂ of arXiv 2402.13753, eq. 2) turn with `original_inverse_frequencies`.
    Differentiable in the frequencies and the attention factor. `angles="exact"` computes in float64: right to
    1e-6 at position 2,097,152, where a float32 product is rounded to 1/8 radian. `"float32"` is transformers'
    order of operations bit for bit (`LlamaRotaryEmbedding.forward`). Raises `ScalingError` when start tokens
    come without original frequencies.
    """
    device = position_ids.device
    # Apple's GPU has no float64: there the few cosines are computed on the CPU.
    place = torch.device("cpu") if angles == "exact" and device.type == "mps" else device
    real = torch.float64 if angles == "exact" else torch.float32
    positions = position_ids[..., None].to(place, real)
    phases = positions * _rows_of_frequencies(inverse_frequencies.to(place, real))
    if isinstance(start_tokens, Tensor) or start_tokens > 0:
        if original_inverse_frequencies is None:
            raise ScalingError("start_tokens needs original_inverse_frequencies: the angles below n̂")
        original = positions * original_inverse_frequencies.to(place, real)
        phases = torch.where(positions < _rows_of_numbers(start_tokens, place), original, phases)
    factor = _rows_of_numbers(attention_factor, place)
    if angles == "exact":
        halves = ((phases.cos() * factor).float(), (phases.sin() * factor).float())
        cos, sin = (torch.cat((half, half), dim=-1) for half in halves)
    else:
        # Doubled before cos, as transformers does: vector loops may round an element differently from their
        # tails.
        doubled = torch.cat((phases, phases), dim=-1)
        cos, sin = (doubled.cos() * factor).float(), (doubled.sin() * factor).float()
    return cos.to(device), sin.to(device)


def _rows_of_frequencies(frequencies: Tensor) -> Tensor:
    return frequencies[:, None, :] if frequencies.ndim == 2 else frequencies


def _rows_of_numbers(value: float | Tensor, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(device)
    return value[:, None, None] if value.ndim == 1 else value[..., None] if value.ndim == 2 else value


def inverse_frequencies_of(factors: Tensor, rope_theta: float, angles: Angles) -> Tensor:
    """θ^(−2i/d) / λ_i for divisors λ [..., d/2]: float64, or float32 in transformers' order of operations."""
    real = torch.float64 if angles == "exact" else torch.float32
    dimension = 2 * factors.shape[-1]
    exponents = torch.arange(0, dimension, 2, device=factors.device).to(real) / dimension
    return 1.0 / (factors.to(real) * rope_theta**exponents)


@dataclass(frozen=True)
class RotarySet:
    """What `rotation` needs for one set, or for one set a row or a token; shapes as there."""

    inverse_frequencies: Tensor
    attention_factor: float | Tensor
    start_tokens: int | Tensor

    def to(self, device: torch.device) -> RotarySet:
        """The set with its frequencies on `device`."""
        return replace(self, inverse_frequencies=_moved(self.inverse_frequencies, device))


def _moved(frequencies: Tensor, device: torch.device) -> Tensor:
    # Apple's GPU cannot hold float64; `rotation` computes on the CPU there.
    return frequencies if device.type == "mps" and frequencies.dtype == torch.float64 else frequencies.to(device)


def _doubled(frequencies: Tensor) -> Tensor:
    return (frequencies.cpu() if frequencies.is_mps else frequencies).double()


class FixedRotary(nn.Module):
    """A model's rotary embedding whose set is chosen from outside, never from the positions of one call.

    Frequencies are plain attributes, not buffers: `.to(bfloat16)`, `from_pretrained` and `state_dict` do not
    touch them, and they follow the hidden states' device. Cos and sin are cast to the hidden states' dtype,
    as in transformers. It starts with factors of one.
    """

    def __init__(self, rope_theta: float, rotary_dim: int, *, angles: Angles = "exact") -> None:
        super().__init__()
        if angles not in get_args(Angles):
            raise ScalingError(f"angles is {angles!r}; it must be exact or float32")
        self.rope_theta, self.rotary_dim, self.angles = float(rope_theta), rotary_dim, angles
        self.original = inverse_frequencies_of(torch.ones(rotary_dim // 2), self.rope_theta, angles)
        self.current: RotarySet | None = RotarySet(self.original, 1.0, 0)

    def set_factors(
        self, factors: Tensor, attention_factor: float | Tensor = 1.0, start_tokens: int | Tensor = 0
    ) -> None:
        """Use divisors λ [D/2], or [B, D/2] for one set a row, from the next forward on; differentiable.

        The other two are numbers or tensors [] or [B]. Raises `ScalingError` for another number of factors.
        """
        if factors.shape[-1] != self.rotary_dim // 2 or factors.ndim not in (1, 2):
            raise ScalingError(
                f"the factors have shape {tuple(factors.shape)}; a rotary_dim of {self.rotary_dim} needs "
                f"[{self.rotary_dim // 2}], or [rows, {self.rotary_dim // 2}] for one set a row"
            )
        frequencies = inverse_frequencies_of(factors, self.rope_theta, self.angles)
        self.current = RotarySet(frequencies, attention_factor, start_tokens)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin [B, S, D] in x's dtype for `position_ids` [B, S]."""
        if self.current is None:
            raise LongRopeError(
                "the rotary embedding was called outside the model's forward: no sequence chooses a set; "
                'load with switch="short" or "long" for a fixed set'
            )
        chosen = self.current
        if chosen.inverse_frequencies.device != x.device:
            chosen = self.current = chosen.to(x.device)
        if self.original.device != x.device:
            self.original = _moved(self.original, x.device)
        cos, sin = rotation(
            position_ids.to(x.device),
            chosen.inverse_frequencies,
            attention_factor=chosen.attention_factor,
            start_tokens=chosen.start_tokens,
            original_inverse_frequencies=self.original,
            angles=self.angles,
        )
        return cos.to(x.dtype), sin.to(x.dtype)


class LayerTypeRotary(nn.Module):
    """The rotary embedding of families with one RoPE a layer type: `full` and, unchanged, the `others`."""

    def __init__(self, full: FixedRotary, others: dict[str, RotarySet]) -> None:
        super().__init__()
        self.full, self.others = full, others

    def forward(self, x: Tensor, position_ids: Tensor, layer_type: str) -> tuple[Tensor, Tensor]:
        """Cos and sin [B, S, D] in x's dtype for the layers of `layer_type`."""
        if layer_type == FULL:
            cos, sin = self.full(x, position_ids)
            return cos, sin
        other = self.others[layer_type] = self.others[layer_type].to(x.device)
        cos, sin = rotation(
            position_ids.to(x.device),
            other.inverse_frequencies,
            attention_factor=other.attention_factor,
            angles=self.full.angles,
        )
        return cos.to(x.dtype), sin.to(x.dtype)


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that holds the model's rotary embedding and calls it once a forward.

    Raises `UnsupportedModelError` for a model type without a row in `FAMILIES`, or one laid out differently.
    """
    family = family_of(model)
    core = core_of(model)
    for path in _rotary_paths(family):
        parent: Any = core
        for name in path.split(".")[:-1]:
            parent = getattr(parent, name, None)
        if isinstance(getattr(parent, "rotary_emb", None), nn.Module):
            assert isinstance(parent, nn.Module)
            return parent
    raise UnsupportedModelError(f"{type(core).__name__} has no rotary embedding at {family.rotary_path}")


def _rotary_paths(family: Family) -> Iterator[str]:
    yield family.rotary_path
    if family.multimodal_rotary_path:
        yield family.multimodal_rotary_path
    yield family.rotary_path.partition(".")[2]  # a decoder without its lm_head


def core_of(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: nn.Module) -> Family:
    """The model's row in `FAMILIES`; raises `UnsupportedModelError` when it has none."""
    return family_for_config(getattr(getattr(model, "config", None), "model_type", None))


def rotary_module(model: nn.Module) -> nn.Module:
    """The rotary embedding that the model uses now; raises as `decoder_of`."""
    module = decoder_of(model).rotary_emb
    assert isinstance(module, nn.Module)
    return module


def replace_rotary(model: nn.Module, module: nn.Module) -> nn.Module:
    """Make `module` the model's rotary embedding and return the one it had (to be put back the same way).

    In a family with one RoPE a layer type a `FixedRotary` serves the full-attention layers only. Do it after
    `from_pretrained`. Raises as `decoder_of`, and `ScalingError` when the module rotates another number of
    values.
    """
    decoder = decoder_of(model)
    before = rotary_module(model)
    if isinstance(module, FixedRotary):
        if module.rotary_dim != (rotated := rotary_dim_of(model)):
            raise ScalingError(
                f"the scaling is for a rotary_dim of {module.rotary_dim}; the model rotates {rotated} values"
            )
        if family_of(model).nested_rope:
            module = LayerTypeRotary(module, _other_layer_types(before))
    decoder.rotary_emb = module
    return before


def _other_layer_types(module: nn.Module) -> dict[str, RotarySet]:
    if isinstance(module, LayerTypeRotary):
        return dict(module.others)
    # Plain float64 copies: the stock module's buffers would be rounded by `.to(bfloat16)`.
    return {
        kind: RotarySet(
            _doubled(getattr(module, f"{kind}_inv_freq").detach()),
            float(getattr(module, f"{kind}_attention_scaling")),
            0,
        )
        for kind in getattr(module, "layer_types", ())
        if kind != FULL
    }


def rotary_dim_of(model: nn.Module) -> int:
    """Values that the model rotates in each head, read from its rotary embedding; raises as `decoder_of`."""
    module: Any = rotary_module(model)
    module = module.full if isinstance(module, LayerTypeRotary) else module
    if isinstance(module, FixedRotary):
        return module.rotary_dim
    name = f"{FULL}_inv_freq" if family_of(model).nested_rope else "inv_freq"
    frequencies = getattr(module, name, None)
    if not isinstance(frequencies, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} has no {name}: the model has no full-attention layer, or this version of "
            "transformers lays it out differently"
        )
    return 2 * int(frequencies.shape[-1])


def rope_theta_of(model: nn.Module) -> float:
    """The model's RoPE base θ (of full attention) from its config; raises `UnsupportedModelError` without."""
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    parameters = config.rope_parameters or {}
    theta = parameters.get(FULL, parameters).get("rope_theta")
    if theta is None:
        raise UnsupportedModelError(f"the config of {type(model).__name__} has no rope_theta")
    return float(theta)


def fixed_rotary(model: nn.Module, *, angles: Angles = "exact") -> FixedRotary:
    """Install a `FixedRotary` with factors of one in the model and return it; raises as `replace_rotary`."""
    module = FixedRotary(rope_theta_of(model), rotary_dim_of(model), angles=angles)
    replace_rotary(model, module)
    return module
