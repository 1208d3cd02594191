"""Which set a sequence is rotated with, decided for each row by its own length, and a cache that stays exact.

The decision sits in a hook on the decoder (below `generate()`), so hand-written loops and evaluations are
covered too.
"""

from __future__ import annotations

import inspect
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from longrope_export.errors import CacheError, ScalingError
from longrope_export.rotary import Angles, FixedRotary, RotarySet, inverse_frequencies_of
from longrope_export.scaling import RopeScaling
from longrope_export.tracked_cache import CachedTokens, TrackedCache, empty_copy, tracked, write_rows

# A rebuild runs in calls of at most this many tokens, or of the longest call that the cache has seen: it
# needs no more memory than the caller has already spent.
REBUILD_TOKENS = 512


class RotarySets:
    """The sets of one record, ordered by the length up to which each applies; the last has no end.

    Raises `ScalingError` when `sets` contradicts `short_factor` at the window itself.
    """

    def __init__(self, scaling: RopeScaling, angles: Angles) -> None:
        window = scaling.original_max_position_embeddings
        short = {window: scaling.short_factor}
        if scaling.sets.get(window, scaling.short_factor) != scaling.short_factor:
            raise ScalingError(f"sets[{window}] differs from short_factor, which applies up to {window} tokens too")
        bounded = sorted((short | dict(scaling.sets)).items())
        self.scaling = scaling
        self.lengths = [length for length, _ in bounded]
        self._sets = [
            self._set(factors, scaling.short_attention_factor, scaling.short_start_tokens, angles)
            for _, factors in bounded
        ]
        self._sets.append(
            self._set(scaling.long_factor, scaling.long_attention_factor, scaling.long_start_tokens, angles)
        )
        self.device = torch.device("cpu")
        self._frequencies = torch.stack([entry.inverse_frequencies for entry in self._sets])
        attention = [entry.attention_factor for entry in self._sets]
        self._attention_factors = torch.tensor(attention, dtype=self._frequencies.dtype)
        self._start_tokens = torch.tensor([entry.start_tokens for entry in self._sets])

    def _set(self, factors: Sequence[float], attention: float, start: int, angles: Angles) -> RotarySet:
        divisors = torch.tensor(factors, dtype=torch.float32)
        return RotarySet(inverse_frequencies_of(divisors, self.scaling.rope_theta, angles), attention, start)

    @property
    def short(self) -> RotarySet:
        """The set at the window."""
        return self._sets[self.index(self.scaling.original_max_position_embeddings)]

    @property
    def long(self) -> RotarySet:
        """The set beyond every bound."""
        return self._sets[-1]

    def index(self, length: int) -> int:
        """Index of the set for a sequence of `length` tokens: the smallest bound that is not below it."""
        return bisect_left(self.lengths, length)

    def indices(self, lengths: Tensor) -> Tensor:
        """`index` of every element."""
        return torch.bucketize(lengths, torch.tensor(self.lengths, device=lengths.device))

    def move(self, device: torch.device) -> None:
        """Keep the sets on `device` from now on."""
        if self.device != device:
            self.device = device
            self._sets = [entry.to(device) for entry in self._sets]

    def rows(self, indices: Sequence[int] | Tensor) -> RotarySet:
        """The sets `indices` ([B] or [B, S]) as one: a plain one when they are all the same."""
        if isinstance(indices, Tensor):
            lowest, highest = int(indices.min()), int(indices.max())
        else:
            lowest, highest = min(indices), max(indices)
        if lowest == highest:
            return self._sets[lowest]
        index = indices.cpu() if isinstance(indices, Tensor) else torch.tensor(indices)
        start: int | Tensor = self._start_tokens[index] if bool(self._start_tokens.any()) else 0
        return RotarySet(self._frequencies[index], self._attention_factors[index], start)


class SequenceSwitch:
    """A forward pre-hook for the decoder that gives each row the set of its own length.

    Length is the number of tokens without padding, this call included. A row whose set changes has its cache
    rebuilt once from its token ids before the call. Position ids are not looked at, except that without cache
    and mask each document of a packed row counts by itself, as transformers isolates it then. Where the mask
    has padding and no position ids are given, they are derived from the mask, as `generate()` does. Raises
    `CacheError` where a cache cannot be kept exact.
    """

    def __init__(self, decoder: nn.Module, rotary: FixedRotary, sets: RotarySets) -> None:
        self.names = tuple(inspect.signature(decoder.forward).parameters)
        self.rotary, self.sets = rotary, sets
        self.rebuilding = False

    def __call__(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.rebuilding:
            return None
        call = dict(zip(self.names, args)) | kwargs
        ids = call.get("input_ids")
        source = ids if ids is not None else call.get("inputs_embeds")
        if source is None:
            return None  # transformers says what is missing
        batch, new = source.shape[:2]
        self.sets.move(source.device)
        mask, given = call.get("attention_mask"), call.get("position_ids")
        cache = self._cache(decoder, call, batch)
        past = 0 if cache is None else cache.get_seq_length()
        padding, left = _padding(mask, batch, past + new)
        positions = _positions(call, past, new, any(padding), source.device)
        if cache is None and mask is None and given is not None:
            self.rotary.current = self.sets.rows(self.sets.indices(_document_lengths(positions)))
            return (), call
        indices = [self.sets.index(past + new - pad) for pad in padding]
        if cache is not None:
            tokens = CachedTokens(
                scaling=self.sets.scaling,
                ids=None if ids is None else ids.clone(),
                positions=positions.expand(batch, -1),
                padding=padding,
                sets=indices,
                obstacle=None if left else "the mask has padding on the right or in between; pad on the left",
                largest_call=new,
            )
            self._append(decoder, cache, tokens)
        self.rotary.current = self.sets.rows(indices)
        return (), call

    def done(self, decoder: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: outside the decoder's forward no set is chosen, so that nobody uses an old one unawares."""
        if not self.rebuilding:
            self.rotary.current = None

    def _cache(self, decoder: Any, call: dict[str, Any], batch: int) -> TrackedCache | None:
        cache = call.get("past_key_values")
        checkpointing = decoder.training and getattr(decoder, "gradient_checkpointing", False)
        if cache is not None:
            if checkpointing:
                raise CacheError("gradient checkpointing drops the cache; train with use_cache=False")
            return tracked(cache, self.sets.scaling, batch)
        wanted = call.get("use_cache")
        if not (decoder.config.use_cache if wanted is None else wanted) or checkpointing:
            return None
        cache = call["past_key_values"] = TrackedCache(config=decoder.config)
        return cache

    def _append(self, decoder: nn.Module, cache: TrackedCache, new: CachedTokens) -> None:
        """Note the call's tokens with the cache, after rebuilding the rows whose set they change."""
        old = cache.tokens
        if old is None:
            cache.tokens = new
            return
        if new.obstacle:
            raise CacheError(f"the cache cannot be continued: {new.obstacle}")
        if old.padding != [min(pad, old.length) for pad in new.padding]:
            raise CacheError("the attention mask hides other cached tokens than before; pass the whole mask again")
        changed = [row for row, pair in enumerate(zip(old.sets, new.sets)) if pair[0] != pair[1]]
        stale = [row for row in changed if new.padding[row] < old.length]
        if stale:
            self._rebuild(decoder, cache, stale, new.sets)
        cache.tokens = old.extended(new)

    def _rebuild(self, decoder: nn.Module, cache: TrackedCache, rows: list[int], indices: list[int]) -> None:
        """Compute the cached keys and values of `rows` again with the sets that they have from now on."""
        tokens = cache.tokens
        assert tokens is not None
        if tokens.ids is None:
            bound = self.sets.lengths[min(tokens.sets[rows[0]], indices[rows[0]])]
            raise CacheError(
                f"row {rows[0]} passes {bound:,} tokens and its cache must be rebuilt, but was filled from "
                "inputs_embeds and the token ids are unknown; "
                'pass input_ids, or load with switch="context", "short" or "long"'
            )
        start = min(tokens.padding[row] for row in rows)
        ids, positions = tokens.ids[rows, start:], tokens.positions[rows, start:]
        lead = torch.tensor([[tokens.padding[row] - start] for row in rows], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) >= lead).long() if bool(lead.any()) else None
        fresh = empty_copy(cache)
        chosen = self.sets.rows([indices[row] for row in rows])
        self.rebuilding = True
        try:
            self.rotary.current = chosen
            step = max(REBUILD_TOKENS, tokens.largest_call)
            for at in range(0, ids.shape[1], step):
                end = min(at + step, ids.shape[1])
                decoder(
                    input_ids=ids[:, at:end],
                    attention_mask=None if mask is None else mask[:, :end],
                    position_ids=positions[:, at:end],
                    past_key_values=fresh,
                    use_cache=True,
                )
        finally:
            self.rebuilding = False
        write_rows(cache, rows, fresh)


def _padding(mask: Any, batch: int, total: int) -> tuple[list[int], bool]:
    """Padding slots of each row of a [B, total] mask, and whether all of them stand on the left."""
    if mask is None:
        return [0] * batch, True
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise CacheError(
            "the length of each row is unknown under a prepared mask; pass a 2-D attention_mask, "
            'or load with switch="context"'
        )
    if tuple(mask.shape) != (batch, total):
        raise CacheError(
            f"attention_mask is {tuple(mask.shape)}; it must cover the cached tokens and this call: {(batch, total)}"
        )
    real = mask.bool()
    counts = real.sum(1, dtype=torch.long).tolist()
    left = all(count == total for count in counts) or not bool((real[:, :-1] & ~real[:, 1:]).any())
    return [total - count for count in counts], left


def _positions(call: dict[str, Any], past: int, new: int, padded: bool, device: torch.device) -> Tensor:
    """The call's position ids [B or 1, new]; missing ones become those that `generate()` would give."""
    positions = call.get("position_ids")
    if positions is None:
        if padded:
            positions = (call["attention_mask"].long().cumsum(1) - 1).clamp(min=0)[:, -new:].to(device)
        else:
            positions = torch.arange(past, past + new, device=device)[None]
        call["position_ids"] = positions
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        raise CacheError("position_ids must be [rows, tokens]")
    return positions


def _document_lengths(positions: Tensor) -> Tensor:
    """Length of each token's document [B, S]; a document ends where position ids do not go on by one."""
    starts = positions.diff(dim=1) != 1
    document = torch.nn.functional.pad(starts.long().cumsum(1), (1, 0))
    counts = torch.zeros_like(document).scatter_add_(1, document, torch.ones_like(document))
    return counts.gather(1, document)
