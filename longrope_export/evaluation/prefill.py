"""Hidden states of a long row a chunk at a time: memory is that of the weights, the KV cache and one chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longrope_export.evaluation.losses import body_of, body_states
from longrope_export.evaluation.prefill_attention import maskless_attention

# Up to here one forward pass needs less than the cache of a longer row would.
AUTOMATIC_ABOVE = 16_384
AUTOMATIC_CHUNK = 1_024


def chunk_for(length: int, asked: int | None) -> int:
    """Tokens of a chunk for a row of `length`: what was `asked` for (0: one forward), else by the length."""
    if asked is not None:
        return asked or length
    return AUTOMATIC_CHUNK if length > AUTOMATIC_ABOVE else length


def state_chunks(
    model: nn.Module, input_ids: Tensor, chunk: int, *, offset: int = 0, cache: Any = None
) -> Iterator[tuple[int, Tensor]]:
    """Start and last hidden states [n, hidden] of each `chunk` tokens of `input_ids` [1, T], in order.

    Position ids are `offset`…; with `cache` (filled by this function, or empty) they go on after it. A row that fits
    into one chunk, without a cache, is one plain forward pass.
    """
    length = input_ids.shape[1]
    if chunk >= length and cache is None:
        positions = torch.arange(offset, offset + length, device=input_ids.device)[None] if offset else None
        yield 0, body_states(model, input_ids, positions)[0]
        return
    past = 0 if cache is None else cache.get_seq_length()
    cache = growing_cache(model, past + length) if cache is None else cache
    for start in range(0, length, chunk):
        part = input_ids[:, start : start + chunk]
        begin = offset + past + start
        positions = torch.arange(begin, begin + part.shape[1], device=input_ids.device)[None]
        with maskless_attention(model):
            outputs = body_of(model)(input_ids=part, position_ids=positions, past_key_values=cache, use_cache=True)
        yield start, outputs.last_hidden_state[0]


def growing_cache(model: Any, capacity: int) -> Any:
    """transformers' dynamic cache, whose full-attention layers have room for `capacity` tokens from the start.

    Its own layers copy everything that they hold for each chunk.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer

    class RoomyLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values in one block of memory each, of which `keys` and `values` show what is filled."""

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                shape = (*key_states.shape[:-2], capacity)
                self.blocks = (
                    key_states.new_empty(*shape, key_states.shape[-1]),
                    value_states.new_empty(*shape, value_states.shape[-1]),
                )
            begin = self.get_seq_length()
            end = begin + key_states.shape[-2]
            self.blocks[0][..., begin:end, :] = key_states
            self.blocks[1][..., begin:end, :] = value_states
            self.keys, self.values = (block[..., :end, :] for block in self.blocks)
            return self.keys, self.values

    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
