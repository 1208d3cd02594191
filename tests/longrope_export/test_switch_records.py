"""`switch="sequence"` with other records, families, dtypes and wrappers."""

from __future__ import annotations

import copy

import pytest
import torch
from switch_checks import (
    CROSSING,
    LONG,
    LONGER,
    LOUD,
    RECORD,
    SHORT,
    TOLERANCE,
    WINDOW,
    Pair,
    alone,
    batch_of,
    build,
    difference,
    generation_difference,
    longrope,
    loop_difference,
    make_pair,
    tokens,
)
from transformers import AutoModelForCausalLM, DynamicCache

from longrope_export import RopeScaling, load


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
def test_packed_documents_count_by_themselves(llama_pair: Pair) -> None:
    ours, stock = llama_pair
    rows = [tokens(33), tokens(20), tokens(11)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    logits = ours(input_ids=torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits[0]
    for part, row in zip(logits.split([33, 20, 11]), rows):
        assert difference(part, alone(stock, row)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama_pair: Pair, dtype: torch.dtype) -> None:
    plain = build("llama")
    ours = load(plain, RECORD).to(dtype)
    config = copy.deepcopy(llama_pair[1].config)
    stock = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    assert stock.model.rotary_emb.inv_freq.dtype == torch.float32
    stock.load_state_dict(ours.state_dict())
    noise = difference(alone(stock, tokens(40)), alone(llama_pair[1], tokens(40)))
    assert generation_difference(ours, stock, CROSSING, steps=16, do_sample=False) <= 2 * noise < 0.5
    assert loop_difference(stock, stock, tokens(36), [1] * 36) > 1.0


def test_a_copied_model_switches_by_itself(llama_pair: Pair) -> None:
    ours, stock = llama_pair
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


def test_sharing_a_row_of_positions_given_by_hand(llama_pair: Pair) -> None:
    ours, stock = llama_pair
    row, cache = tokens(40), DynamicCache()
    with torch.no_grad():
        for at in range(0, 40, 10):
            positions = torch.arange(1000 + at, 1010 + at)[None]
            logits = ours(row[:, at : at + 10], position_ids=positions, past_key_values=cache).logits[0]
    # Rotation is relative: the same row 1000 positions later gives the same logits, up to rounding.
    assert difference(logits, alone(stock, row)[-10:]) <= 1e-3
