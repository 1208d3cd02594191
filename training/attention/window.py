"""Causal attention over the last tokens only, in blocks of queries, for families with a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longrope_export.training.attention.dot_product import dot_product

# Queries of a block; with a window of w tokens a block's mask has BLOCK × (BLOCK + w) elements.
BLOCK = 512


def windowed(query: Tensor, key: Tensor, value: Tensor, window: int, *, scale: float | None, dropout: float) -> Tensor:
    """Attention [B, H, S, D] of each token over itself and the `window` - 1 tokens before it (transformers' rule).

    A block's keys are recomputed from the pieces they span in the backward pass, so memory is linear in S.
    """
    size = min(BLOCK, max(window, 16))
    queries, keys, values = (torch.split(states, size, dim=2) for states in (query, key, value))
    outputs = []
    for number, block in enumerate(queries):
        first = max(0, (number * size - window + 1) // size)
        pieces = (*keys[first : number + 1], *values[first : number + 1])
        offset = (number - first) * size
        if torch.is_grad_enabled():
            states = checkpoint(
                _block, block, offset, window, scale, dropout, *pieces,
                use_reentrant=False, preserve_rng_state=dropout > 0,
            )  # fmt: skip
        else:
            states = _block(block, offset, window, scale, dropout, *pieces)
        outputs.append(states)
    return torch.cat(outputs, dim=2)


def _block(query: Tensor, offset: int, window: int, scale: float | None, dropout: float, *pieces: Tensor) -> Tensor:
    """One block of queries, the first of which is token `offset` of the keys."""
    half = len(pieces) // 2
    key, value = torch.cat(pieces[:half], dim=2), torch.cat(pieces[half:], dim=2)
    queries = torch.arange(offset, offset + query.shape[2], device=query.device)[:, None]
    keys = torch.arange(key.shape[2], device=query.device)
    mask = (keys <= queries) & (keys > queries - window)
    return dot_product(query, key, value, mask=mask, scale=scale, dropout=dropout)
