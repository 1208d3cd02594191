"""`switch="sequence"` against stock transformers without a cache, each row alone, and mutants of it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import pytest
import torch
from switch_checks import (
    CROSSING,
    LENGTHS,
    LOUD,
    TOLERANCE,
    WINDOW,
    Pair,
    alone,
    batch_of,
    difference,
    generation_difference,
    loop_difference,
    tokens,
)

from longrope_export.switching import RotarySets, SequenceSwitch

MIXED = [tokens(10), tokens(28), tokens(WINDOW - 1), tokens(WINDOW), tokens(WINDOW + 8)]


def test_greedy_generation_in_a_mixed_batch(pair: Pair) -> None:
    assert generation_difference(*pair, MIXED, steps=54, do_sample=False) <= TOLERANCE


def test_generation_without_a_cache(pair: Pair) -> None:
    assert generation_difference(*pair, CROSSING, steps=14, do_sample=False, use_cache=False) <= TOLERANCE


def test_greedy_tokens_equal_stock_without_cache(pair: Pair) -> None:
    ours, stock = pair
    prompt = tokens(28)
    expected = stock.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(ours.generate(prompt, max_new_tokens=12, do_sample=False), expected)


def test_sampling_with_a_fixed_seed(pair: Pair) -> None:
    ours, stock = pair
    sampled = []
    for model, cached in ((ours, True), (stock, False)):
        torch.manual_seed(7)
        sampled.append(model.generate(tokens(24), max_new_tokens=24, do_sample=True, top_k=0, use_cache=cached))
    assert torch.equal(*sampled)
    assert generation_difference(ours, stock, CROSSING, steps=16, do_sample=True, top_k=0) <= TOLERANCE


def test_beam_search(pair: Pair) -> None:
    ours, stock = pair
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 14, "num_return_sequences": 3}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    together = ours.generate(**batch_of(CROSSING), **options)
    for index, prompt in enumerate(CROSSING):
        expected = stock.generate(prompt, use_cache=False, **options)
        rows = slice(3 * index, 3 * index + 3)
        assert torch.equal(together.sequences[rows, -14:], expected.sequences[:, -14:])
        assert difference(together.sequences_scores[rows], expected.sequences_scores) <= TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_hand_written_loop(pair: Pair, length: int) -> None:
    assert loop_difference(*pair, tokens(length), [1] * length) <= TOLERANCE


@pytest.mark.parametrize("chunk", [5, 16, WINDOW, WINDOW + 1])
def test_hand_written_chunks(pair: Pair, chunk: int) -> None:
    chunks = [chunk] * (82 // chunk) + [82 % chunk or chunk]
    assert loop_difference(*pair, tokens(sum(chunks)), chunks) <= TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_prefill(pair: Pair, length: int) -> None:
    prompts = [tokens(length), tokens(20)]
    options = {"prefill_chunk_size": 12, "do_sample": False}
    assert generation_difference(*pair, prompts, steps=3, **options) <= TOLERANCE


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_one_forward_over_a_left_padded_batch(pair: Pair, length: int) -> None:
    ours, stock = pair
    rows = [tokens(length), tokens(WINDOW - 1, 1), tokens(WINDOW, 1), tokens(WINDOW + 1, 1), tokens(5)]
    logits = ours(**batch_of(rows)).logits
    for index, row in enumerate(rows):
        assert difference(logits[index, -row.shape[1] :], alone(stock, row)) <= TOLERANCE


@torch.no_grad()
def test_right_padded_batch_without_continuation(llama_pair: Pair) -> None:
    ours, stock = llama_pair
    rows = [tokens(20), tokens(40)]
    ids = torch.cat([torch.nn.functional.pad(row, (0, 40 - row.shape[1])) for row in rows])
    mask = torch.tensor([[1] * 20 + [0] * 20, [1] * 40])
    logits = ours(input_ids=ids, attention_mask=mask).logits
    for index, row in enumerate(rows):
        assert difference(logits[index, : row.shape[1]], alone(stock, row)) <= TOLERANCE


# The same checks must fail for stock transformers with its cache, and for every way of getting the loader
# wrong.


def test_stock_with_cache_fails_these_checks(pair: Pair) -> None:
    _, stock = pair
    assert loop_difference(stock, stock, tokens(40), [1] * 40) > LOUD
    assert generation_difference(stock, stock, [tokens(28), tokens(10)], steps=8, do_sample=False) > LOUD


def no_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SequenceSwitch, "_rebuild", lambda *arguments: None)


def whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = RotarySets.rows
    monkeypatch.setattr(RotarySets, "rows", lambda self, indices: rows(self, [max(indices)] * len(indices)))


def one_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RotarySets, "index", lambda self, length: bisect_right(self.lengths, length - 2))


def one_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RotarySets, "index", lambda self, length: bisect_right(self.lengths, length))


def padding_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    append = SequenceSwitch._append

    def mutant(self: Any, decoder: Any, cache: Any, new: Any) -> None:
        total = new.length + (0 if cache.tokens is None else cache.tokens.length)
        new.sets[:] = [self.sets.index(total)] * len(new.sets)
        append(self, decoder, cache, new)

    monkeypatch.setattr(SequenceSwitch, "_append", mutant)


@pytest.mark.parametrize("mutate", [no_rebuild, whole_batch, one_too_late, one_too_early, padding_counted])
def test_mutants_are_caught(
    llama_pair: Pair, mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tokens(28), tokens(10)]
    assert generation_difference(*llama_pair, prompts, steps=8, do_sample=False) <= TOLERANCE
    mutate(monkeypatch)
    assert generation_difference(*llama_pair, prompts, steps=8, do_sample=False) > LOUD


def processed_tokens(model: Any, run: Callable[[], object]) -> list[int]:
    """Tokens (rows × length) of each pass through the first layer during `run`."""
    sizes: list[int] = []
    layer = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["hidden_states"].shape[:2].numel()), with_kwargs=True
    )
    run()
    layer.remove()
    return sizes


def test_only_the_crossing_row_is_rebuilt_and_only_once(pair: Pair) -> None:
    ours, _ = pair
    prompts = [tokens(28), tokens(10)]
    sizes = processed_tokens(ours, lambda: ours.generate(**batch_of(prompts), max_new_tokens=12, do_sample=False))
    assert sizes == [2 * 28, 2, 2, 2, 2, 32, 2, 2, 2, 2, 2, 2, 2]


def test_rebuild_runs_in_calls_no_longer_than_the_longest_before(
    llama_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longrope_export.switching.REBUILD_TOKENS", 4)
    ours, stock = llama_pair
    sizes = processed_tokens(ours, lambda: loop_difference(ours, stock, tokens(34), [12, 12, 8, 2]))
    assert sizes == [12, 12, 8, 12, 12, 8, 2]
    assert loop_difference(ours, stock, tokens(34), [12, 12, 8, 2]) <= TOLERANCE
