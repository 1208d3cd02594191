"""Caches under `switch="sequence"`: cut, reordered, repeated, selected from or copied; and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from switch_checks import (
    RECORD,
    TOLERANCE,
    Pair,
    alone,
    build,
    check_continued,
    continued,
    difference,
    filled,
    tokens,
)
from transformers import DynamicCache, QuantizedCache, StaticCache

from longrope_export import RopeScaling, load
from longrope_export.errors import CacheError, LongRopeError


@pytest.mark.parametrize("size", [1, 6, 20])
def test_reordered_cache(llama_pair: Pair, size: int) -> None:
    rows = [tokens(20), tokens(28), tokens(31)]
    cache = filled(llama_pair[0], rows)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    check_continued(llama_pair, cache, [rows[2], rows[0], rows[0]], size)


@pytest.mark.parametrize("size", [1, 6, 20])
def test_repeated_and_selected_cache(llama_pair: Pair, size: int) -> None:
    rows = [tokens(20), tokens(31)]
    cache = filled(llama_pair[0], rows)
    cache.batch_repeat_interleave(2)
    check_continued(llama_pair, copy.deepcopy(cache), [rows[0], rows[0], rows[1], rows[1]], size)
    cache.batch_select_indices(torch.tensor([False, True, True, False]))
    check_continued(llama_pair, copy.deepcopy(cache), rows, size)
    cache.batch_select_indices(torch.tensor([1]))
    check_continued(llama_pair, cache, [rows[1]], size)


def test_cache_cut_back_below_the_window_is_short_again(llama_pair: Pair) -> None:
    row = tokens(40)
    cache = filled(llama_pair[0], [row])
    cache.crop(-20)
    check_continued(llama_pair, cache, [row[:, :20]], 3)
    check_continued(llama_pair, cache, [torch.cat([row[:, :20], tokens(3, 1)], dim=1)], 12)


def test_one_prefix_for_two_continuations(llama_pair: Pair) -> None:
    row = tokens(30)
    cache = filled(llama_pair[0], [row])
    check_continued(llama_pair, copy.deepcopy(cache), [row], 9)
    check_continued(llama_pair, cache, [row], 1)


def test_emptied_cache_starts_anew(llama_pair: Pair) -> None:
    ours, stock = llama_pair
    cache = filled(ours, [tokens(40)])
    cache.reset()
    assert difference(continued(ours, cache, [tokens(0)], [tokens(20)])[0], alone(stock, tokens(20))) <= TOLERANCE


def test_generate_continues_a_returned_cache(pair: Pair) -> None:
    ours, stock = pair
    first = ours.generate(tokens(26), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    again = ours.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=9, do_sample=False)
    assert torch.equal(again, stock.generate(tokens(26), max_new_tokens=12, do_sample=False, use_cache=False))


# What cannot be exact is refused.


def test_inputs_embeds_raise_at_the_crossing_only(llama_pair: Pair) -> None:
    ours, stock = llama_pair
    row = tokens(30)
    with torch.no_grad():
        cache = ours(inputs_embeds=ours.get_input_embeddings()(row), use_cache=True).past_key_values
    check_continued(llama_pair, cache, [row], 2)
    with pytest.raises(CacheError, match=r"passes 32 tokens .* inputs_embeds"), torch.no_grad():
        ours(input_ids=tokens(1), past_key_values=cache)
    with torch.no_grad():
        logits = ours(inputs_embeds=ours.get_input_embeddings()(tokens(40))).logits[0]
    assert difference(logits, alone(stock, tokens(40))) <= TOLERANCE


@torch.no_grad()
def test_foreign_caches(llama_pair: Pair) -> None:
    ours, stock = llama_pair
    foreign = stock(input_ids=tokens(10), use_cache=True).past_key_values
    with pytest.raises(CacheError, match="filled elsewhere"):
        ours(input_ids=tokens(1), past_key_values=foreign)
    other = load(build("llama"), RopeScaling.from_dict({**RECORD.to_dict(), "long_factor": [2.0] * 16}))
    with pytest.raises(CacheError, match="another scaling"):
        other(input_ids=tokens(1), past_key_values=filled(ours, [tokens(10)]))
    changed = filled(ours, [tokens(10)])
    changed.layers[0].crop(-2)
    with pytest.raises(CacheError, match="changed outside"):
        ours(input_ids=tokens(1), past_key_values=changed)


@torch.no_grad()
def test_cache_kinds(llama_pair: Pair) -> None:
    ours, _ = llama_pair
    with pytest.raises(CacheError, match="StaticCache"):
        ours(input_ids=tokens(5), past_key_values=StaticCache(config=ours.config, max_cache_len=64))
    with pytest.raises(CacheError, match="StaticCache"):
        ours.generate(tokens(5), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(CacheError, match="offloaded"):
        ours(input_ids=tokens(5), past_key_values=DynamicCache(config=ours.config, offloading=True))
    with pytest.raises(CacheError, match="QuantizedCache"):
        ours(input_ids=tokens(5), past_key_values=QuantizedCache("fp8", ours.config))


def test_generation_modes_that_take_tokens_back(llama_pair: Pair) -> None:
    ours, stock = llama_pair
    with pytest.raises(CacheError, match="prompt lookup"):
        ours.generate(tokens(20), max_new_tokens=2, prompt_lookup_num_tokens=3)
    with pytest.raises(CacheError, match="assistant model"):
        ours.generate(tokens(20), max_new_tokens=2, assistant_model=stock)
    with pytest.raises(CacheError, match="assisted"):
        filled(ours, [tokens(4)]).activate_past_recording()


@torch.no_grad()
def test_masks_that_hide_the_length(llama_pair: Pair) -> None:
    ours, _ = llama_pair
    right = torch.tensor([[1] * 8 + [0] * 2])
    cache = ours(input_ids=tokens(10), attention_mask=right, use_cache=True).past_key_values
    with pytest.raises(CacheError, match="padding on the right"):
        ours(input_ids=tokens(1), past_key_values=cache)
    with pytest.raises(CacheError, match="padding on the right"):
        ours(
            input_ids=tokens(2),
            attention_mask=torch.tensor([[1] * 11 + [0]]),
            past_key_values=filled(ours, [tokens(10)]),
        )
    padded = filled(ours, [tokens(10), tokens(6)])
    with pytest.raises(CacheError, match="pass the whole mask"):
        ours(input_ids=tokens(1).expand(2, -1), past_key_values=padded)
    with pytest.raises(CacheError, match="must cover"):
        ours(input_ids=tokens(2), attention_mask=torch.ones(1, 2), past_key_values=filled(ours, [tokens(10)]))
    with pytest.raises(CacheError, match="2-D attention_mask"):
        ours(input_ids=tokens(4), attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(CacheError, match="2 rows"):
        ours(input_ids=tokens(1), past_key_values=padded)


def test_gradient_checkpointing_with_a_cache() -> None:
    ours = load(build("llama"), RECORD)
    ours.activation_checkpointing_enable()
    ours.train()
    with pytest.raises(CacheError, match="use_cache=False"):
        ours(input_ids=tokens(4), past_key_values=DynamicCache(config=ours.config))
    loss = ours(input_ids=tokens(40), labels=tokens(40), use_cache=False).loss
    loss.backward()
    assert float(ours.model.embed_tokens.weight.grad.abs().max()) > 0


def test_the_rotary_embedding_alone_raises(llama_pair: Pair) -> None:
    ours, _ = llama_pair
    alone(ours, tokens(40))
    with pytest.raises(LongRopeError, match="outside the model's forward"):
        ours.model.rotary_emb(torch.zeros(1), torch.arange(4)[None])
