"""Attention of a plan by PyTorch's scaled dot-product kernels: no mask, memory linear in the number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longrope_export.training.attention.dot_product import dot_product
from longrope_export.training.attention.plan import Batch, Plan
from longrope_export.training.attention.window import windowed


def attend(plan: Plan, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
    """Outputs [N, H, D] for queries [N, H, D] over keys and values [N, H or H/g, D], the tokens of all rows in line."""
    queries = _parts(query, plan.queries, [batch.count * batch.queries for batch in plan.batches])
    keys, values = (
        _parts(states, plan.keys, [batch.count * batch.keys for batch in plan.batches]) for states in (key, value)
    )
    outputs = [
        _batch(batch, *parts, scale=scale, dropout=dropout)
        for batch, *parts in zip(plan.batches, queries, keys, values)
    ]
    line = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return line if plan.outputs is None else line.index_select(0, plan.outputs)


def _parts(states: Tensor, index: Tensor | None, sizes: list[int]) -> Sequence[Tensor]:
    # One gathering for all batches: the gradient of each would be as large as all tokens.
    parts: Sequence[Tensor] = torch.split(states if index is None else states.index_select(0, index), sizes)
    return parts


def _batch(batch: Batch, query: Tensor, key: Tensor, value: Tensor, *, scale: float | None, dropout: float) -> Tensor:
    query, key, value = (part.reshape(batch.count, -1, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
    if batch.window is not None:
        states = windowed(query, key, value, batch.window, scale=scale, dropout=dropout)
    else:
        states = dot_product(query, key, value, causal=batch.causal, scale=scale, dropout=dropout)
    return states.transpose(1, 2).flatten(0, 1)


def heads_of(states: Tensor, heads: Sequence[int], query_heads: int) -> Tensor:
    """The keys or values [N, K, D] that the query heads `heads` (of `query_heads`) use.

    As few heads as they share, where they share them evenly, else one for each.
    """
    share = query_heads // states.shape[1]
    wanted = [head // share for head in heads]
    distinct = sorted(set(wanted))
    ratio = len(wanted) // len(distinct)
    even = [head for head in distinct for _ in range(ratio)] == wanted
    return _chosen(states, distinct if even else wanted)


def _chosen(states: Tensor, heads: list[int]) -> Tensor:
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if step > 0 and heads == list(range(heads[0], heads[-1] + 1, step)):
        return states[:, heads[0] : heads[-1] + 1 : step]
    return states.index_select(1, torch.tensor(heads, device=states.device))
