"""At which prefix lengths, and in which allocated contexts, a runtime is compared in each regime."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longrope_export.converters.hypotheses import Regime
from longrope_export.errors import LongRopeError
from longrope_export.runtimes import llamacpp
from longrope_export.scaling import RopeScaling

REGIMES: tuple[Regime, Regime] = ("short", "long")

# How far beyond the window prefixes go: far enough to need the long factors, near enough to be affordable.
BEYOND = 1.25
# In the long regime some prefixes stay below the window: llama.cpp applies the long factors there too.
BELOW_SHARE = 4


@dataclass(frozen=True)
class Limits:
    """How many prefix lengths are wanted on one side of the window, the longest allowed, and the regimes."""

    prefixes: int
    max_prefix: int | None = None
    regimes: tuple[Regime, ...] = REGIMES


@dataclass(frozen=True)
class Plan:
    """Prefix lengths of one regime, and the context in tokens that llama.cpp allocates for it (0: not llama.cpp)."""

    regime: Regime
    prefixes: tuple[int, ...]
    context: int = 0


def plan_gguf(scaling: RopeScaling, limits: Limits) -> tuple[list[Plan], list[str]]:
    """The regimes that llama.cpp can be brought into, and remarks on those that it cannot.

    It allocates multiples of 256 tokens, takes the long set where they exceed the window, and refuses a prompt that
    fills them.
    """
    window, extended = scaling.original_max_position_embeddings, scaling.max_position_embeddings
    cap = limits.max_prefix or extended
    plans: list[Plan] = []
    notes: list[str] = []
    roof = window // llamacpp.CONTEXT_GRANULE * llamacpp.CONTEXT_GRANULE
    if "short" in limits.regimes and roof:
        lengths = _spread(min(cap, roof - 1), limits.prefixes)
        plans.append(Plan("short", lengths, llamacpp.padded_context(max(lengths) + 1)))
    elif "short" in limits.regimes:
        notes.append(
            f"llama.cpp allocates at least {llamacpp.CONTEXT_GRANULE} tokens, more than the window of {window}: "
            "it never applies the short factors"
        )
    if "long" in limits.regimes and extended > window:
        lengths = _beyond(window, min(cap, extended - 1), limits.prefixes)
        plans.append(Plan("long", lengths, llamacpp.padded_context(max(window, max(lengths)) + 1)))
        if max(lengths) <= window:
            notes.append(
                f"no prompt is longer than the window of {window}: the long factors were checked below it only"
            )
    elif "long" in limits.regimes:
        notes.append("the window does not grow: the long factors never apply")
    return plans, notes


def plan_folder(scaling: RopeScaling, limits: Limits) -> tuple[list[Plan], list[str]]:
    """Prefixes up to the window for the short regime, beyond it for the long one: transformers decides by length.

    Raises `LongRopeError` when the longest allowed prefix does not pass the window.
    """
    window, extended = scaling.original_max_position_embeddings, scaling.max_position_embeddings
    cap = limits.max_prefix or extended
    if cap <= window < extended and "long" in limits.regimes:
        raise LongRopeError(
            f"prefixes of at most {cap} tokens stay inside the window of {window}, where transformers applies the "
            "short factors only; allow longer ones"
        )
    plans: list[Plan] = []
    notes: list[str] = []
    if "short" in limits.regimes:
        plans.append(Plan("short", _spread(min(cap, window), limits.prefixes)))
    if "long" in limits.regimes and extended > window:
        above = prefix_lengths(window + 1, min(cap, extended, _far(window, limits.prefixes)), limits.prefixes)
        plans.append(Plan("long", tuple(above)))
    elif "long" in limits.regimes:
        notes.append("the window does not grow: the long factors never apply")
    return plans, notes


def _spread(high: int, count: int) -> tuple[int, ...]:
    return tuple(prefix_lengths(max(1, high // count), high, count))


def _beyond(window: int, roof: int, count: int) -> tuple[int, ...]:
    """Lengths above the window and a few below it; where `roof` allows none above, all of them below."""
    above = prefix_lengths(window + 1, min(roof, _far(window, count)), count)
    few = max(1, count // BELOW_SHARE) if above else count
    return tuple(prefix_lengths(max(1, min(window, roof) // 2), min(window, roof), few) + above)


def _far(window: int, count: int) -> int:
    return max(round(window * BEYOND), window + count)


def prefix_lengths(low: int, high: int, count: int) -> list[int]:
    """At most `count` increasing lengths from `low` to `high`, both included, evenly spaced."""
    if low > high or count < 1:
        return []
    return [int(value) for value in np.unique(np.linspace(low, high, count).round())]
