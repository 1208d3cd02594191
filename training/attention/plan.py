"""Blocks gathered into few batches of equal shape, so that many short documents cost few calls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longrope_export.training.attention.blocks import Block

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Blocks computed in one call: `count` of them, of `queries` and `keys` tokens each, equally many where causal."""

    count: int
    queries: int
    keys: int
    causal: bool
    window: int | None


@dataclass(frozen=True)
class Plan:
    """Batches, the tokens that are their queries and keys, laid end to end, and where in their outputs, laid so too,
    each token's output stands. None for an index means all tokens in order.
    """

    batches: tuple[Batch, ...]
    queries: Tensor | None
    keys: Tensor | None
    outputs: Tensor | None


def plan_of(blocks: Sequence[Block], tokens: int, device: torch.device) -> Plan:
    """The plan that computes `blocks`, whose queries are all of `tokens` tokens, each once."""
    shared: dict[tuple[int, int, bool, int | None], list[Block]] = defaultdict(list)
    for block in blocks:
        shared[_shape(block)].append(block)
    batches = tuple(_batch(group) for group in shared.values())
    pairs = list(zip(batches, shared.values()))
    keys = _lines((block.key, batch.keys) for batch, group in pairs for block in group)
    queries = _lines(
        (block.key if batch.causal else block.query, batch.queries) for batch, group in pairs for block in group
    )
    indices = (np.minimum(queries, tokens - 1), np.minimum(keys, tokens - 1), _outputs(pairs, tokens))
    return Plan(batches, *(_index(index, tokens, device) for index in indices))


def _shape(block: Block) -> tuple[int, int, bool, int | None]:
    """Blocks with the same shape are computed together; causal ones are padded to it."""
    if block.window is not None:
        return block.query, block.keys, True, block.window  # long documents one by one
    if block.causal:
        # Rounded up by at most an eighth: tokens behind a document's end are seen by none of its own.
        step = max(1, (1 << block.keys.bit_length()) >> 4)
        return -1, -(-block.keys // step) * step, True, None
    return block.queries, block.keys, False, None


def _batch(group: Sequence[Block]) -> Batch:
    first, keys = group[0], max(block.keys for block in group)
    return Batch(len(group), keys if first.causal else first.queries, keys, first.causal, first.window)


def _lines(ranges: Iterable[tuple[int, int]]) -> Integers:
    """The numbers of all ranges (first, count), end to end; beyond the last token they are clipped by the caller."""
    return np.concatenate([np.arange(first, first + count) for first, count in ranges])


def _outputs(pairs: Sequence[tuple[Batch, Sequence[Block]]], tokens: int) -> Integers:
    """Where the output of each token will stand."""
    outputs, offset = np.full(tokens, -1, dtype=np.int64), 0
    for batch, group in pairs:
        for block in group:
            first = offset + (block.query - block.key if batch.causal else 0)
            outputs[block.query : block.query + block.queries] = np.arange(first, first + block.queries)
            offset += batch.queries
    assert outputs.min() >= 0, "a query has no block"
    return outputs


def inverse_order(order: Sequence[int], device: torch.device) -> Tensor | None:
    """Where each of 0, 1, … stands in `order`, or None where it is at home."""
    return _index(np.argsort(np.asarray(order, dtype=np.int64)), len(order), device)


def _index(values: Integers, tokens: int, device: torch.device) -> Tensor | None:
    if len(values) == tokens and bool((values == np.arange(tokens)).all()):
        return None
    # A tensor made in inference mode could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return torch.from_numpy(values).to(device)
