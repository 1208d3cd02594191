"""Other scalings that a runtime could have applied instead of the record's, by mistake or by not knowing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from longrope_export.scaling import RopeScaling

Regime = Literal["short", "long"]


def all_ones(scaling: RopeScaling) -> RopeScaling:
    """The same model without any scaling."""
    ones = (1.0,) * (scaling.rotary_dim // 2)
    return replace(
        scaling, long_factor=ones, short_factor=ones, long_attention_factor=1.0, short_attention_factor=1.0,
        long_start_tokens=0, short_start_tokens=0, sets={},
    )  # fmt: skip


def swapped(scaling: RopeScaling) -> RopeScaling:
    """The record with its long and short sets exchanged."""
    return replace(
        scaling, long_factor=scaling.short_factor, short_factor=scaling.long_factor,
        long_attention_factor=scaling.short_attention_factor, short_attention_factor=scaling.long_attention_factor,
        long_start_tokens=scaling.short_start_tokens, short_start_tokens=scaling.long_start_tokens, sets={},
    )  # fmt: skip


def expressible(scaling: RopeScaling) -> RopeScaling:
    """The part of the record that transformers' own classes and llama.cpp can apply; see `lossy.hf_losses`."""
    return replace(
        scaling, long_start_tokens=0, short_start_tokens=0, short_attention_factor=scaling.long_attention_factor, sets={},
    )  # fmt: skip


def alternatives(scaling: RopeScaling, regime: Regime) -> dict[str, RopeScaling]:
    """What else a runtime could have applied in this regime, without what is the same there."""
    named = {"all ones": all_ones(scaling), f"the {_opposite(regime)} set": swapped(scaling)}
    return {name: record for name, record in named.items() if set_of(record, regime) != set_of(scaling, regime)}


def _opposite(regime: Regime) -> Regime:
    return "long" if regime == "short" else "short"


def set_of(scaling: RopeScaling, regime: Regime) -> tuple[Any, ...]:
    """Factors, attention factor and start tokens that apply in the regime."""
    return tuple(getattr(scaling, f"{regime}_{part}") for part in ("factor", "attention_factor", "start_tokens"))


def _attention(scaling: RopeScaling, power: float) -> RopeScaling:
    return replace(
        scaling,
        long_attention_factor=scaling.long_attention_factor**power,
        short_attention_factor=scaling.short_attention_factor**power,
    )


def _factors(scaling: RopeScaling, change: Callable[[float], float]) -> RopeScaling:
    return replace(
        scaling,
        long_factor=tuple(change(value) for value in scaling.long_factor),
        short_factor=tuple(change(value) for value in scaling.short_factor),
    )


# Mistakes that writers and runtimes make, named when a file fails.
MISTAKES: dict[str, Callable[[RopeScaling], RopeScaling]] = {
    "all ones": all_ones,
    "long and short sets exchanged": swapped,
    "attention factor missing": lambda scaling: _attention(scaling, 0.0),
    "attention factor squared": lambda scaling: _attention(scaling, 2.0),
    "factors without effect": lambda scaling: _factors(scaling, lambda value: 1.0),
    "factors inverted": lambda scaling: _factors(scaling, lambda value: 1.0 / value),
    "factors halved": lambda scaling: _factors(scaling, lambda value: value / 2.0),
    "start tokens ignored": lambda scaling: replace(scaling, long_start_tokens=0, short_start_tokens=0),
}


def mistakes(scaling: RopeScaling, regime: Regime) -> dict[str, RopeScaling]:
    """The record with each of the known mistakes made, without those that change nothing in this regime."""
    made = {name: change(scaling) for name, change in MISTAKES.items()}
    return {name: record for name, record in made.items() if set_of(record, regime) != set_of(scaling, regime)}


def _shuffled(scaling: RopeScaling) -> RopeScaling:
    order = np.random.default_rng(1).permutation(len(scaling.long_factor))
    long, short = scaling.long_factor, scaling.short_factor
    return replace(
        scaling, long_factor=tuple(long[index] for index in order), short_factor=tuple(short[index] for index in order)
    )


# Wrong records that a comparison must reject, whatever the model: a proof of the proof.
MUTANTS: dict[str, Callable[[RopeScaling], RopeScaling]] = {
    "dropped": all_ones,
    "halved": MISTAKES["factors halved"],
    "shuffled": _shuffled,
    "swapped": swapped,
}
