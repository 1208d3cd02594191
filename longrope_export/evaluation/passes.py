"""Which lengths may share a forward pass: those that the model rotates alike over the whole row."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from longrope_export.errors import UnsupportedModelError
from longrope_export.loader import check_scaling
from longrope_export.rotary import FixedRotary, LayerTypeRotary, decoder_of, replace_rotary, rotary_module
from longrope_export.scaling import RopeScaling
from longrope_export.switching import SequenceSwitch


def forward_lengths(lengths: Sequence[int], rotation: Callable[[int], Hashable]) -> dict[int, int]:
    """The length of the forward pass that serves each length: the longest one with an equal `rotation(length)`."""
    longest: dict[Hashable, int] = {}
    for length in sorted(lengths):
        longest[rotation(length)] = length
    return {length: longest[rotation(length)] for length in lengths}


def rotation_of(model: nn.Module) -> Callable[[int], Hashable]:
    """A key for the rotation that `model` applies to a row of a given length; equal keys may share a forward pass.

    Knows the loader's switch, its fixed sets, and transformers' own longrope and dynamic NTK, which decide by length
    in every forward pass.
    """
    try:
        decoder, rotary = decoder_of(model), _full_rotary(model)
    except UnsupportedModelError:
        return _by_config(model)
    for hook in decoder._forward_pre_hooks.values():
        if isinstance(hook, SequenceSwitch) and hook.rotary is rotary:
            return hook.sets.index
    return (lambda length: 0) if isinstance(rotary, FixedRotary) else _by_config(model)


def is_dynamic(model: nn.Module) -> bool:
    """Whether transformers' own dynamic NTK rotates, whose frequencies depend on earlier calls too."""
    try:
        if isinstance(_full_rotary(model), FixedRotary):
            return False
    except UnsupportedModelError:
        pass
    return "dynamic" in _rope_types(model)


def _full_rotary(model: nn.Module) -> nn.Module:
    installed = rotary_module(model)
    return installed.full if isinstance(installed, LayerTypeRotary) else installed


def _by_config(model: Any) -> Callable[[int], Hashable]:
    window = original_window(model)
    if "dynamic" in _rope_types(model):
        return lambda length: max(length, window)
    if "longrope" in _rope_types(model):
        return lambda length: length > window
    return lambda length: 0


def _rope_types(model: Any) -> set[str]:
    return {entry.get("rope_type", "default") for entry in _rope_entries(model)}


def original_window(model: Any) -> int:
    """The window L before any scaling that the model's config names; 0 when it names none."""
    config = model.config.get_text_config()
    named = [entry.get("original_max_position_embeddings") for entry in _rope_entries(model)]
    named.append(getattr(config, "original_max_position_embeddings", None))
    return int(min((value for value in named if value), default=getattr(config, "max_position_embeddings", 0) or 0))


def _rope_entries(model: Any) -> list[dict[str, Any]]:
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    nested = [entry for entry in rope.values() if isinstance(entry, dict)]
    return nested or [rope]


@contextmanager
def fixed_set(model: nn.Module, scaling: RopeScaling, which: Literal["long", "short"]) -> Iterator[None]:
    """Rotate with one of the record's sets at every length inside the `with`, then as before.

    Only the rotary embedding is exchanged, so one resident model serves many records. Raises `ScalingError` when the
    record is for another model.
    """
    check_scaling(model, scaling)
    rotary = FixedRotary(scaling.rope_theta, scaling.rotary_dim)
    long = which == "long"
    rotary.set_factors(
        torch.tensor(scaling.long_factor if long else scaling.short_factor),
        scaling.long_attention_factor if long else scaling.short_attention_factor,
        scaling.long_start_tokens if long else scaling.short_start_tokens,
    )
    before = replace_rotary(model, rotary)
    try:
        yield
    finally:
        decoder_of(model).rotary_emb = before
