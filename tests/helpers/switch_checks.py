"""Random models, and the ways of running them that `switch="sequence"` is compared in: batches, loops, caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from longrope_export import RopeScaling, load
from longrope_export.tracked_cache import TrackedCache

WINDOW, LONGER, THETA, DIM, PAD = 32, 128, 10000.0, 32, 0
ATTENTION = 1.18
LONG = tuple(1.0 + 3.0 * i / 15 for i in range(16))
SHORT = tuple(1.0 + 0.2 * i / 15 for i in range(16))
TOLERANCE, LOUD = 1e-4, 0.1
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


CROSSING = [tokens(26), tokens(20)]


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
