"""What the training-time attention costs in one layer: forward and backward, as ratios of processor time.

    python benchmarks/training_attention.py [--tokens 4096] [--rounds 3]

Queries, keys and values have SmolLM2-135M's shape (9 heads, 3 for keys, 64 values). The base of each ratio is what
transformers' "sdpa" does for the same row: PyTorch's causal kernel for one document, a [T, T] mask for packed documents or
a sliding window. Times are processor seconds of one thread, the best of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import alternating_seconds, best_ratio, machine
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longrope_export.training.attention import Pattern, register

HEADS, KEY_HEADS, SIZE, WINDOW = 9, 3, 64, 512


def main() -> None:
    """Print one line for each way to attend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokens = options.tokens
    inputs = [torch.randn(1, tokens, heads, SIZE).transpose(1, 2) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    short = tuple(_short_documents(tokens))
    print(f"{machine()}; {tokens:,} tokens; packed: {len(short)} documents of 16 to 128 tokens; window: {WINDOW}")
    group = tokens // 4
    whole = ((tokens,),)
    _compare("one document", options.rounds, {
        "stock": _step(inputs, partial(_stock, None)),
        "longrope_full": _step(inputs, _ours("longrope_full", Pattern(whole, group))),
        "longrope_s2": _step(inputs, _ours("longrope_s2", Pattern(whole, group))),
        "longrope_scca fixed": _step(inputs, _ours("longrope_scca", Pattern(whole, group))),
        "longrope_scca flow": _step(inputs, _ours("longrope_scca", Pattern(whole, group, "flow"))),
    })  # fmt: skip
    _compare("packed documents", options.rounds, {
        "stock": _step(inputs, lambda *states: _stock(_document_mask(short), *states)),
        "one call a document": _step(inputs, lambda *states: _one_by_one(short, *states)),
        "longrope_full": _step(inputs, _ours("longrope_full", Pattern((short,), group))),
    })  # fmt: skip
    _compare("sliding window", options.rounds, {
        "stock": _step(inputs, lambda *states: _stock(_window_mask(tokens), *states)),
        "longrope_full": _step(inputs, _ours("longrope_full", Pattern(whole, group), sliding_window=WINDOW)),
    })  # fmt: skip


def _compare(title: str, rounds: int, runs: dict[str, Callable[[], object]]) -> None:
    seconds = alternating_seconds(runs, rounds, clock=time.process_time)
    ratios = ", ".join(f"{name} {best_ratio(seconds, name, 'stock'):.2f}" for name in list(runs)[1:])
    print(f"{title}: stock {min(seconds['stock']):.2f} s; {ratios}", flush=True)


def _step(inputs: list[Tensor], attend: Callable[..., Tensor]) -> Callable[[], object]:
    def run() -> None:
        states = [part.detach().requires_grad_() for part in inputs]
        torch.autograd.backward(attend(*states).sum())

    return run


def _ours(name: str, pattern: Pattern, **more: Any) -> Callable[..., Tensor]:
    function = register._function(name)
    return lambda *states: function(None, *states, None, longrope_pattern=pattern, **more)[0]


def _stock(mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    # As transformers does: grouped heads without a mask, repeated ones with it.
    if mask is not None:
        key, value = (states.repeat_interleave(HEADS // KEY_HEADS, 1) for states in (key, value))
    grouped = mask is None
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=grouped, enable_gqa=grouped)


def _one_by_one(lengths: tuple[int, ...], *states: Tensor) -> Tensor:
    return torch.cat(
        [_stock(None, *pieces) for pieces in zip(*(torch.split(part, list(lengths), 2) for part in states))], 2
    )


def _document_mask(lengths: tuple[int, ...]) -> Tensor:
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return ((number[:, None] == number) & _causal(len(number)))[None, None]


def _window_mask(tokens: int) -> Tensor:
    return (_causal(tokens) & ~_causal(tokens).tril(-WINDOW))[None, None]


def _causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def _short_documents(tokens: int) -> list[int]:
    lengths: list[int] = []
    rng = np.random.default_rng(0)
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, int(rng.integers(16, 128, endpoint=True))))
    return lengths


if __name__ == "__main__":
    main()
