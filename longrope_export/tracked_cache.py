"""A KV cache that remembers which tokens its entries came from, so that a row can be rebuilt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from longrope_export.errors import CacheError
from longrope_export.scaling import RopeScaling

_ADVICE = 'use the default dynamic cache, or load with switch="context", "short" or "long"'


@dataclass(frozen=True)
class CachedTokens:
    """What a cache of B rows and T slots holds.

    `ids` is int64 [B, T], or None where they are unknown; `positions` int64 [B, T]; `padding` the number of
    leading padding slots of each row, `sets` the index of the set that each row was rotated with, `scaling`
    the record. `obstacle` says why the cache must not be continued; `largest_call` is the longest forward
    that it has seen.
    """

    scaling: RopeScaling
    ids: Tensor | None
    positions: Tensor
    padding: list[int]
    sets: list[int]
    obstacle: str | None = None
    largest_call: int = 0

    @property
    def length(self) -> int:
        """Number of slots T."""
        return int(self.positions.shape[1])

    def extended(self, new: CachedTokens) -> CachedTokens:
        """The tokens of both, `new` after these; everything that is not per slot is taken from `new`."""
        known = self.ids is not None and new.ids is not None
        return replace(
            new,
            ids=torch.cat([self.ids, new.ids], dim=1) if known else None,  # type: ignore[list-item]
            positions=torch.cat([self.positions, new.positions], dim=1),
            obstacle=self.obstacle or new.obstacle,
            largest_call=max(self.largest_call, new.largest_call),
        )

    def cropped(self, length: int) -> CachedTokens:
        """The first `length` slots."""
        ids = None if self.ids is None else self.ids[:, :length]
        padding = [min(pad, length) for pad in self.padding]
        return replace(self, ids=ids, positions=self.positions[:, :length], padding=padding)

    def rows(self, indices: Tensor) -> CachedTokens:
        """Rows `indices` (integers or a boolean mask), in that order."""
        order = torch.arange(len(self.padding))[indices.cpu()].tolist()
        return replace(
            self,
            ids=None if self.ids is None else self.ids[order],
            positions=self.positions[order],
            padding=[self.padding[row] for row in order],
            sets=[self.sets[row] for row in order],
        )


class TrackedCache(DynamicCache):  # type: ignore[misc]
    """transformers' dynamic cache, whose `tokens` follow each reordering, crop, repetition and selection."""

    tokens: CachedTokens | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        if self.tokens is not None:
            self._select(torch.arange(len(self.tokens.padding)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if self.tokens is not None:
            self.tokens = self.tokens.cropped(self.get_seq_length())

    def reset(self) -> None:
        super().reset()
        self.tokens = None

    def activate_past_recording(self) -> None:
        raise CacheError(f"assisted generation would keep entries of rejected tokens' set; {_ADVICE}")

    def _select(self, indices: Tensor) -> None:
        if self.tokens is not None:
            self.tokens = self.tokens.rows(indices)


def tracked(cache: Any, scaling: RopeScaling, batch: int) -> TrackedCache:
    """`cache` itself, turned into a `TrackedCache` when it is an empty dynamic cache.

    Raises `CacheError` for another kind of cache, for one that this scaling's loader did not fill, that was
    changed behind its back, that has another number of rows than `batch`, or that must not be continued.
    """
    if not isinstance(cache, TrackedCache):
        _check_kind(cache)
        # In place, because the caller (generate, a loop) goes on using this very object.
        cache.__class__ = TrackedCache
        cache.tokens = None
    assert isinstance(cache, TrackedCache)
    _check_tokens(cache, scaling, batch)
    return cache


def _check_kind(cache: Any) -> None:
    name = type(cache).__name__
    if type(cache) is not DynamicCache or cache.offloading:
        kind = f"an offloaded {name}" if getattr(cache, "offloading", False) else f"a {name}"
        raise CacheError(f"{kind} cannot be rebuilt when a row passes the window; {_ADVICE}")
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise CacheError(f"a cache with {type(layer).__name__} cannot be rebuilt at the window; {_ADVICE}")
    if cache.get_seq_length():
        raise CacheError("the cache was filled elsewhere, so its set and tokens are unknown; start with an empty cache")


def _check_tokens(cache: TrackedCache, scaling: RopeScaling, batch: int) -> None:
    tokens, length = cache.tokens, cache.get_seq_length()
    if length != (0 if tokens is None else tokens.length):
        raise CacheError(
            "the cache was changed outside its own methods, or a forward failed; start with an empty cache"
        )
    if tokens is None:
        return
    if tokens.scaling is not scaling and tokens.scaling != scaling:
        raise CacheError("the cache was filled by a model with another scaling; start with an empty cache")
    if len(tokens.padding) != batch:
        raise CacheError(f"the cache has {len(tokens.padding)} rows and the call {batch}")
    if tokens.obstacle:
        raise CacheError(f"the cache cannot be continued: {tokens.obstacle}")


def empty_copy(cache: Cache) -> DynamicCache:
    """An empty cache with the same kinds of layers."""
    copy = DynamicCache()
    copy.layers = [
        DynamicSlidingWindowLayer(layer.sliding_window) if layer.is_sliding else DynamicLayer()
        for layer in cache.layers
    ]
    return copy


def write_rows(cache: Cache, rows: Sequence[int], source: Cache) -> None:
    """Put `source`'s rows, in order, in place of `rows`, aligned at the newest entry (older is padding)."""
    for layer, fresh in zip(cache.layers, source.layers):
        layer.keys = _with_rows(layer.keys, rows, fresh.keys)
        layer.values = _with_rows(layer.values, rows, fresh.values)


def _with_rows(old: Tensor, rows: Sequence[int], new: Tensor) -> Tensor:
    if new.shape == old.shape:
        return new
    # Never in place: the old tensors may be shared with a copy, or be part of a graph.
    index = torch.tensor(rows, device=old.device)
    block = old.index_select(0, index)
    block[..., -new.shape[-2] :, :] = new
    return old.index_copy(0, index, block)
