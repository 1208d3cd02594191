"""The implementations under their names in transformers' attention interface, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from longrope_export.errors import LongRopeError, UnsupportedModelError
from longrope_export.rotary import core_of, family_of
from longrope_export.training.attention.blocks import HeadBlocks, full_blocks
from longrope_export.training.attention.pattern import Pattern
from longrope_export.training.attention.plan import Plan, inverse_order, plan_of
from longrope_export.training.attention.run import attend, heads_of
from longrope_export.training.attention.sparse import s2_blocks, scca_blocks

NAMES: dict[str, Callable[[Pattern, int], list[HeadBlocks]]] = {
    "longrope_full": full_blocks,
    "longrope_s2": s2_blocks,
    "longrope_scca": scca_blocks,
}
"""Blocks of the layers without a sliding window, by the implementation's name."""


def use_attention(model: nn.Module, name: str) -> str:
    """Make `name` (one of `NAMES`, or transformers' own) the model's attention and return the one it had.

    Raises `UnsupportedModelError` for a family that is not known here, or whose attention has more than queries, keys
    and values: a soft cap, sinks, images, no causality.
    """
    core: Any = core_of(model)
    if name in NAMES:
        check_model(core)
        _register()
    before = str(core.config._attn_implementation)
    core.set_attn_implementation(name)
    return before


@contextmanager
def training_attention(model: nn.Module, name: str) -> Iterator[None]:
    """Use `name` as the model's attention inside the block; raises as `use_attention`."""
    before = use_attention(model, name)
    try:
        yield
    finally:
        use_attention(model, before)


def check_model(core: Any) -> None:
    """Raise `UnsupportedModelError` where the implementations here would not be the model's attention."""
    family, config = family_of(core), core.config
    reasons = {
        "its attention scores have a soft cap": getattr(config, "attn_logit_softcapping", None) is not None,
        "its attention has sinks": any(hasattr(module, "sinks") for module in core.modules()),
        "its attention is not causal": getattr(config, "use_bidirectional_attention", False)
        or not getattr(config, "is_causal", True),
        "it also reads images; train its text model": config is not config.get_text_config(),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UnsupportedModelError(f"training attention does not support {family.name} here: {reason}")


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in NAMES:
        AttentionInterface.register(name, _function(name))
        AttentionMaskInterface.register(name, _no_mask)


def _no_mask(*, attention_mask: Tensor | None = None, **_: Any) -> None:
    """The pattern decides. Without this entry transformers would drop a padding mask silently, or split documents
    wherever positions jump.
    """
    if attention_mask is not None:
        raise LongRopeError("training attention takes no attention_mask: padding is a document of the pattern")


def _function(name: str) -> Callable[..., tuple[Tensor, None]]:
    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        longrope_pattern: Pattern | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        pattern = _checked(name, query, key, attention_mask, longrope_pattern, more)
        states = [line.transpose(1, 2).flatten(0, 1) for line in (query, key, value)]
        output = _attention(name, pattern, states, sliding_window, scale=scaling, dropout=dropout)
        return output.reshape(query.shape[0], -1, *output.shape[1:]), None

    return forward


def _checked(
    name: str, query: Tensor, key: Tensor, mask: Tensor | None, pattern: Pattern | None, more: dict[str, Any]
) -> Pattern:
    """The pattern, when it fits what attention was called with."""
    if pattern is None:
        raise LongRopeError(f"{name} needs longrope_pattern=Pattern(…) in the model's forward")
    if mask is not None or key.shape[2] != query.shape[2]:
        raise LongRopeError(f"{name} is for training: no attention_mask and use_cache=False")
    if (len(pattern.rows), pattern.tokens) != (query.shape[0], query.shape[2]):
        raise LongRopeError(
            f"the pattern is for {len(pattern.rows)} rows of {pattern.tokens} tokens; attention has {query.shape[0]} "
            f"of {query.shape[2]}"
        )
    for unknown in ("softcap", "s_aux", "position_bias"):
        if more.get(unknown) is not None:
            raise UnsupportedModelError(f"{name} does not support attention with {unknown}")
    return pattern


def _attention(
    name: str, pattern: Pattern, states: list[Tensor], window: int | None, *, scale: float | None, dropout: float
) -> Tensor:
    """Outputs [N, H, D] for query, key and value states [N, H, D] of all rows in line."""
    query, key, value = states
    heads = query.shape[1]
    plans, order = _plans(name, pattern, heads, window, query.device)
    outputs = [
        attend(plan, *(heads_of(states, chosen, heads) for states in (query, key, value)), scale=scale, dropout=dropout)
        for chosen, plan in plans
    ]
    line = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return line if order is None else line.index_select(1, order)


# One batch's plans serve all layers and the recomputation; a second one is under way in pipelined training.
@lru_cache(maxsize=8)
def _plans(
    name: str, pattern: Pattern, heads: int, window: int | None, device: torch.device
) -> tuple[list[tuple[tuple[int, ...], Plan]], Tensor | None]:
    """Query heads with their plan, and where each head's output stands among theirs (None: in order)."""
    # Layers with a sliding window are cheap already and keep it, also under the cheaper patterns.
    groups = full_blocks(pattern, heads, window) if window is not None else NAMES[name](pattern, heads)
    groups = [group for group in groups if group.heads]
    tokens = pattern.tokens * len(pattern.rows)
    order = [head for group in groups for head in group.heads]
    return [(group.heads, plan_of(group.blocks, tokens, device)) for group in groups], inverse_order(order, device)
