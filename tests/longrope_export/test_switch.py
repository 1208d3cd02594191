"""`switch="sequence"` against stock transformers without a cache, each row alone."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache

from longrope_export import RopeScaling, load
from longrope_export.errors import CacheError
from longrope_export.switching import RotarySets, SequenceSwitch
from longrope_export.tracked_cache import TrackedCache

WINDOW, LONGER, THETA, DIM, PAD = 32, 128, 10000.0, 32, 0
ATTENTION = 1.18
LONG = tuple(1.0 + 3.0 * i / 15 for i in range(16))
SHORT = tuple(1.0 + 0.2 * i / 15 for i in range(16))
TOLERANCE, LOUD = 1e-4, 0.1
FAMILIES = ("llama", "qwen2", "qwen3", "phi3")
LENGTHS = (WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + 50)

RECORD = RopeScaling(
    rope_theta=THETA, rotary_dim=DIM, original_max_position_embeddings=WINDOW, max_position_embeddings=LONGER,
    long_factor=LONG, short_factor=SHORT, long_attention_factor=ATTENTION, short_attention_factor=ATTENTION,
)  # fmt: skip


def longrope(**changes: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": THETA, "long_factor": list(LONG), "short_factor": list(SHORT),
        "factor": LONGER / WINDOW, "attention_factor": ATTENTION, "original_max_position_embeddings": WINDOW,
        **changes,
    }  # fmt: skip


def build(family: str, rope: dict[str, Any] | None = None, weights: Any = None, **options: Any) -> Any:
    """A random model; `rope` None gives plain RoPE, `weights` is a model of the same shape to copy from."""
    torch.manual_seed(0)
    rope = rope or {"rope_type": "default", "rope_theta": THETA}
    if family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}
        options |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    options |= {"original_max_position_embeddings": WINDOW} if family == "phi3" else {"head_dim": DIM}
    config = AutoConfig.for_model(
        family, vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.15, max_position_embeddings=LONGER,
        rope_parameters=rope, bos_token_id=1, eos_token_id=None, pad_token_id=PAD, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    if weights is not None:
        model.load_state_dict(weights.state_dict())
    return model


Pair = tuple[Any, Any]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    """Ours and stock longrope, with the same weights."""
    return make_pair(request.param)


@pytest.fixture(scope="module")
def llama() -> Pair:
    return make_pair("llama")


def make_pair(family: str, record: RopeScaling = RECORD, **options: Any) -> Pair:
    plain = build(family, **options)
    return load(plain, record), build(family, longrope(), weights=plain, **options)


def tokens(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * seed + length)
    return torch.randint(3, 97, (1, length), generator=generator)


def batch_of(rows: list[Tensor]) -> dict[str, Tensor]:
    """The rows, padded on the left."""
    longest = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0), value=PAD) for row in rows])
    mask = torch.cat([torch.arange(longest)[None] >= longest - row.shape[1] for row in rows]).long()
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def alone(stock: Any, row: Tensor) -> Tensor:
    """Logits [S, vocabulary] of one row without padding: what every way of running it has to give."""
    logits: Tensor = stock(input_ids=row, use_cache=False).logits[0]
    return logits


def each_prefix_alone(stock: Any, row: Tensor) -> Tensor:
    """Last logits [S, vocabulary] of each of the row's prefixes alone.

    Within one set stock is causal, so that one forward gives them all; at `LENGTHS` each prefix has its own
    forward.
    """
    logits = torch.cat([alone(stock, row[:, :WINDOW]), alone(stock, row)[WINDOW:]])
    for length in LENGTHS:
        if length <= row.shape[1]:
            logits[length - 1] = alone(stock, row[:, :length])[-1]
    return logits


def difference(left: Tensor, right: Tensor) -> float:
    return float((left.float() - right.float()).abs().max())


@torch.no_grad()
def generation_difference(model: Any, stock: Any, prompts: list[Tensor], steps: int, **options: Any) -> float:
    """Largest |Δlogit| over all steps between a generation in one batch and stock on each row alone."""
    result = model.generate(
        **batch_of(prompts), max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **options
    )
    worst = 0.0
    for index, prompt in enumerate(prompts):
        row = torch.cat([prompt, result.sequences[index, -steps:-1][None]], dim=1)
        logits = torch.stack([step[index] for step in result.logits])
        worst = max(worst, difference(logits, each_prefix_alone(stock, row)[-steps:]))
    return worst


@torch.no_grad()
def loop_difference(model: Any, stock: Any, row: Tensor, chunks: list[int]) -> float:
    """Largest |Δlogit| of a hand-written loop: each chunk against stock on the row so far."""
    cache, at, worst = DynamicCache(config=model.config), 0, 0.0
    for size in chunks:
        logits = model(input_ids=row[:, at : at + size], past_key_values=cache).logits[0]
        at += size
        worst = max(worst, difference(logits, alone(stock, row[:, :at])[-size:]))
    return worst


MIXED = [tokens(10), tokens(28), tokens(WINDOW - 1), tokens(WINDOW), tokens(WINDOW + 8)]
CROSSING = [tokens(26), tokens(20)]


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
        sampled.append(model.generate(tokens(24), max_new_tokens=60, do_sample=True, top_k=0, use_cache=cached))
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
def test_right_padded_batch_without_continuation(llama: Pair) -> None:
    ours, stock = llama
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
    llama: Pair, mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tokens(28), tokens(10)]
    assert generation_difference(*llama, prompts, steps=8, do_sample=False) <= TOLERANCE
    mutate(monkeypatch)
    assert generation_difference(*llama, prompts, steps=8, do_sample=False) > LOUD


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


def test_rebuild_runs_in_calls_no_longer_than_the_longest_before(llama: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longrope_export.switching.REBUILD_TOKENS", 4)
    ours, stock = llama
    sizes = processed_tokens(ours, lambda: loop_difference(ours, stock, tokens(34), [12, 12, 8, 2]))
    assert sizes == [12, 12, 8, 12, 12, 8, 2]
    assert loop_difference(ours, stock, tokens(34), [12, 12, 8, 2]) <= TOLERANCE


# Caches that are cut, reordered, repeated, selected from or copied.


@torch.no_grad()
def filled(model: Any, rows: list[Tensor]) -> TrackedCache:
    cache = model(**batch_of(rows), use_cache=True).past_key_values
    assert isinstance(cache, TrackedCache)
    return cache


@torch.no_grad()
def continued(model: Any, cache: Any, rows: list[Tensor], new: list[Tensor]) -> Tensor:
    whole = batch_of([torch.cat([row, more], dim=1) for row, more in zip(rows, new)])
    size = new[0].shape[1]
    mask = whole["attention_mask"]
    return model(input_ids=whole["input_ids"][:, -size:], attention_mask=mask, past_key_values=cache).logits  # type: ignore[no-any-return]


def check_continued(pair: Pair, cache: Any, rows: list[Tensor], size: int) -> None:
    ours, stock = pair
    new = [tokens(size, seed + 1) for seed in range(len(rows))]
    logits = continued(ours, cache, rows, new)
    for index, (row, more) in enumerate(zip(rows, new)):
        assert difference(logits[index], alone(stock, torch.cat([row, more], dim=1))[-size:]) <= TOLERANCE


@pytest.mark.parametrize("size", [1, 6, 20])
def test_reordered_cache(llama: Pair, size: int) -> None:
    rows = [tokens(20), tokens(28), tokens(31)]
    cache = filled(llama[0], rows)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    check_continued(llama, cache, [rows[2], rows[0], rows[0]], size)


@pytest.mark.parametrize("size", [1, 6, 20])
def test_repeated_and_selected_cache(llama: Pair, size: int) -> None:
    rows = [tokens(20), tokens(31)]
    cache = filled(llama[0], rows)
    cache.batch_repeat_interleave(2)
    check_continued(llama, copy.deepcopy(cache), [rows[0], rows[0], rows[1], rows[1]], size)
    cache.batch_select_indices(torch.tensor([False, True, True, False]))
    check_continued(llama, copy.deepcopy(cache), rows, size)
    cache.batch_select_indices(torch.tensor([1]))
    check_continued(llama, cache, [rows[1]], size)


def test_cache_cut_back_below_the_window_is_short_again(llama: Pair) -> None:
    row = tokens(40)
    cache = filled(llama[0], [row])
    cache.crop(-20)
    check_continued(llama, cache, [row[:, :20]], 3)
    check_continued(llama, cache, [torch.cat([row[:, :20], tokens(3, 1)], dim=1)], 12)


def test_one_prefix_for_two_continuations(llama: Pair) -> None:
    row = tokens(30)
    cache = filled(llama[0], [row])
    check_continued(llama, copy.deepcopy(cache), [row], 9)
    check_continued(llama, cache, [row], 1)


def test_emptied_cache_starts_anew(llama: Pair) -> None:
    ours, stock = llama
    cache = filled(ours, [tokens(40)])
    cache.reset()
    assert difference(continued(ours, cache, [tokens(0)], [tokens(20)])[0], alone(stock, tokens(20))) <= TOLERANCE


def test_generate_continues_a_returned_cache(pair: Pair) -> None:
    ours, stock = pair
    first = ours.generate(tokens(26), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    again = ours.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=9, do_sample=False)
    assert torch.equal(again, stock.generate(tokens(26), max_new_tokens=12, do_sample=False, use_cache=False))


# What cannot be exact is refused.


def test_inputs_embeds_raise_at_the_crossing_only(llama: Pair) -> None:
    ours, stock = llama
    row = tokens(30)
    with torch.no_grad():
        cache = ours(inputs_embeds=ours.get_input_embeddings()(row), use_cache=True).past_key_values
    check_continued(llama, cache, [row], 2)
    with pytest.raises(CacheError, match=r"passes 32 tokens .* inputs_embeds"), torch.no_grad():
        ours(input_ids=tokens(1), past_key_values=cache)
    with torch.no_grad():
        logits = ours(inputs_embeds=ours.get_input_embeddings()(tokens(40))).logits[0]
    assert difference(logits, alone(stock, tokens(40))) <= TOLERANCE


@torch.no_grad()
def test_foreign_caches(llama: Pair) -> None:
    ours, stock = llama
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
def test_cache_kinds(llama: Pair) -> None:
    ours, _ = llama
    with pytest.raises(CacheError, match="StaticCache"):
        ours(input_ids=tokens(5), past_key_values=StaticCache(config=ours.config, max_cache_len=64))
    with pytest.raises(CacheError, match="StaticCache"):
        ours.generate(tokens(5), max_new_tokens=2, cache_implementation="static")
    with pytest.raises(CacheError, match="offloaded"):
        ours(input_ids=tokens(5), past_key_values=DynamicCache(config=ours.config, offloading=True))
    with pytest.raises(CacheError, match="QuantizedCache"):
        ours(input_ids=tokens(5), past_key_values=QuantizedCache("fp8", ours.config))


def test_generation_modes_that_take_tokens_back(llama: Pair) -> None:
    ours, stock = llama
    with pytest.raises(CacheError, match="prompt lookup"):
        ours.generate(tokens(20), max_new_tokens=2, prompt_lookup_num_tokens=3)
    with pytest.raises(CacheError, match="assistant model"):
        ours.generate(tokens(20), max_new_tokens=2, assistant_model=stock)
    with pytest.raises(CacheError, match="assisted"):
        filled(ours, [tokens(4)]).activate_past_recording()


@torch.no_grad()
def test_masks_that_hide_the_length(llama: Pair) -> None:
    ours, _ = llama
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


def test_the_rotary_embedding_alone_raises(llama: Pair) -> None:
    from longrope_export.errors import LongRopeError

    ours, _ = llama
    alone(ours, tokens(40))
    with pytest.raises(LongRopeError, match="outside the model's forward"):
        ours.model.rotary_emb(torch.zeros(1), torch.arange(4)[None])


# Other records, families and dtypes.


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_sliding_windows(family: str) -> None:
    pair = make_pair(family, **({"sliding_window": 24} if family == "mistral" else {}))
    assert generation_difference(*pair, [tokens(28), tokens(10), tokens(36)], steps=12, do_sample=False) <= TOLERANCE
    assert loop_difference(*pair, tokens(60), [20, 9, 1, 1, 1, 1, 1, 26]) <= TOLERANCE
    assert loop_difference(pair[1], pair[1], tokens(40), [1] * 40) > LOUD


def test_sets_between_short_and_long() -> None:
    middle, small = tuple(1.0 + 1.5 * i / 15 for i in range(16)), (1.3,) * 16
    record = RopeScaling.from_dict({**RECORD.to_dict(), "sets": {"48": list(middle), "16": list(small)}})
    plain = build("llama")
    ours = load(plain, record)
    fixed = {
        length: build("llama", longrope(short_factor=list(factors), long_factor=list(factors)), weights=plain)
        for length, factors in ((16, small), (WINDOW, SHORT), (48, middle), (LONGER, LONG))
    }
    row = tokens(60)
    cache = DynamicCache(config=ours.config)
    with torch.no_grad():
        for length in range(1, 61):
            logits = ours(input_ids=row[:, length - 1 : length], past_key_values=cache).logits[0, -1]
            stock = fixed[next(bound for bound in (16, WINDOW, 48, LONGER) if length <= bound)]
            assert difference(logits, alone(stock, row[:, :length])[-1]) <= TOLERANCE


def test_a_set_at_the_window_that_contradicts_the_short_one() -> None:
    record = RopeScaling.from_dict({**RECORD.to_dict(), "sets": {str(WINDOW): [1.5] * 16}})
    with pytest.raises(ValueError, match="differs from short_factor"):
        load(build("llama"), record)


def test_attention_factor_of_each_set() -> None:
    record = RopeScaling.from_dict({**RECORD.to_dict(), "short_attention_factor": 1.05, "long_attention_factor": 1.3})
    plain = build("llama")
    ours = load(plain, record)
    short, long = (build("llama", longrope(attention_factor=value), weights=plain) for value in (1.05, 1.3))
    rows = [tokens(20), tokens(40)]
    with torch.no_grad():
        logits = ours(**batch_of(rows)).logits
    assert difference(logits[0, -20:], alone(short, rows[0])) <= TOLERANCE
    assert difference(logits[1], alone(long, rows[1])) <= TOLERANCE
    assert difference(logits[0, -20:], alone(long, rows[0])) > 1e-2


@pytest.mark.parametrize("start", ["long_start_tokens", "short_start_tokens"])
def test_start_tokens_survive_the_cache(start: str) -> None:
    record = RopeScaling.from_dict({**RECORD.to_dict(), start: 8})
    plain = build("llama")
    ours, without = load(copy.deepcopy(plain), record), build("llama", longrope(), weights=plain)
    assert generation_difference(ours, ours, CROSSING, steps=16, do_sample=False) <= TOLERANCE
    row = tokens(40 if start.startswith("long") else 20)
    assert difference(alone(ours, row), alone(without, row)) > LOUD
    # A bare forward derives positions from the mask: n̂ counts each row's own tokens.
    with torch.no_grad():
        padded = ours(**batch_of([row, tokens(50)])).logits[0, -row.shape[1] :]
    assert difference(padded, alone(ours, row)) <= TOLERANCE


@torch.no_grad()
def test_packed_documents_count_by_themselves(llama: Pair) -> None:
    ours, stock = llama
    rows = [tokens(33), tokens(20), tokens(11)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    logits = ours(input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits[0]
    for part, row in zip(logits.split([33, 20, 11]), rows):
        assert difference(part, alone(stock, row)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama: Pair, dtype: torch.dtype) -> None:
    plain = build("llama")
    ours = load(plain, RECORD).to(dtype)
    config = copy.deepcopy(llama[1].config)
    stock = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert stock.model.rotary_emb.inv_freq.dtype == torch.float32
    stock.load_state_dict(ours.state_dict())
    noise = difference(alone(stock, tokens(40)), alone(llama[1], tokens(40)))
    assert generation_difference(ours, stock, CROSSING, steps=16, do_sample=False) <= 2 * noise < 0.5
    assert loop_difference(stock, stock, tokens(36), [1] * 36) > 1.0


def test_a_copied_model_switches_by_itself(llama: Pair) -> None:
    ours, stock = llama
    twin = copy.deepcopy(ours)
    assert twin.model.rotary_emb is not ours.model.rotary_emb
    assert generation_difference(twin, stock, CROSSING, steps=14, do_sample=False) <= TOLERANCE
    assert ours.model.rotary_emb.current is None
    load(twin, RopeScaling.from_dict({**RECORD.to_dict(), "short_factor": list(LONG)}))
    assert not twin.model._forward_pre_hooks
    assert generation_difference(ours, stock, CROSSING, steps=14, do_sample=False) <= TOLERANCE


# peft 0.21 still asks transformers for the name that it deprecated.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_inside_a_peft_wrapper() -> None:
    peft = pytest.importorskip("peft")
    plain = build("llama")
    stock = build("llama", longrope(), weights=plain)
    wrapped = load(peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"])).eval(), RECORD)
    assert generation_difference(wrapped, stock, CROSSING, steps=14, do_sample=False) <= TOLERANCE
    assert loop_difference(wrapped, stock, tokens(36), [1] * 36) <= TOLERANCE


def test_sharing_a_row_of_positions_given_by_hand(llama: Pair) -> None:
    ours, stock = llama
    row, cache = tokens(40), DynamicCache()
    with torch.no_grad():
        for at in range(0, 40, 10):
            positions = torch.arange(1000 + at, 1010 + at)[None]
            logits = ours(row[:, at : at + 10], position_ids=positions, past_key_values=cache).logits[0]
    # Rotation is relative: the same row 1000 positions later gives the same logits, up to rounding.
    assert difference(logits, alone(stock, row)[-10:]) <= 1e-3
