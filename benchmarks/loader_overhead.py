"""Time of a model under `load(switch="sequence")` against the same model of transformers.

    python benchmarks/loader_overhead.py [--tokens 1024] [--steps 64] [--rounds 5]

A random Llama of SmolLM2-135M's shape, float32, one thread, processor time. Prints three ratios of medians: one
forward without cache, a token-by-token continuation with cache, and the same continuation across the window (which
includes the one rebuild; transformers' own result is wrong there).
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from typing import Any

import torch
from common import alternating_seconds, machine, median_ratio
from transformers import LlamaConfig, LlamaForCausalLM

from longrope_export import RopeScaling, load

THETA = 100_000.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"machine": machine()} | measure(options.tokens, options.steps, options.rounds), indent=2))


@torch.no_grad()
def measure(tokens: int, steps: int, rounds: int) -> dict[str, float]:
    stock = build()
    ids = torch.randint(3, 49152, (1, tokens), generator=torch.Generator().manual_seed(0))
    ratios = {}
    for name, window, continued in (
        ("forward", tokens // 2, 0),
        ("continuation", 4 * tokens, steps),
        ("continuation_across_the_window", tokens + steps // 2, steps),
    ):
        ours = load(copy.deepcopy(stock), record(window))
        runs = {
            "ours": lambda ours=ours, continued=continued: run(ours, ids, continued),
            "stock": lambda continued=continued: run(stock, ids, continued),
        }
        seconds = alternating_seconds(runs, rounds, clock=time.process_time)
        ratios[name] = round(median_ratio(seconds, "ours", "stock"), 4)
    return ratios


def run(model: Any, ids: torch.Tensor, steps: int) -> None:
    """One forward without cache, or a prefill and `steps` single tokens with one."""
    cache = model(input_ids=ids, use_cache=steps > 0, logits_to_keep=1).past_key_values
    for _ in range(steps):
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def record(window: int) -> RopeScaling:
    return RopeScaling(
        rope_theta=THETA, rotary_dim=64, original_max_position_embeddings=window,
        max_position_embeddings=4 * window, long_factor=(4.0,) * 32,
    )  # fmt: skip


def build() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    main()
