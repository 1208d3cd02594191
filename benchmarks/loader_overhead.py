"""Time of a model under `load(switch="sequence")` against the same model of transformers.

    python benchmarks/loader_overhead.py [--tokens 1024] [--steps 64] [--rounds 7]

A random Llama of SmolLM2-135M's shape, float32, one thread, processor time. Prints three ratios of the best times, each
with the spread over the rounds: one forward without cache, a token-by-token continuation with cache, and the same
continuation across the window (which includes the one rebuild; transformers' own result is wrong there). Last, what a
call costs more, in milliseconds: the continuation's difference on a model of two tiny layers, where it is not lost in
the noise of the layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from common import alternating_seconds, best_ratio, machine, ratio_spread
from transformers import LlamaConfig, LlamaForCausalLM

from longrope_export import RopeScaling, load

THETA = 100_000.0
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3,
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 1, "num_key_value_heads": 1,
}  # fmt: skip


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"machine": machine()} | measure(options.tokens, options.steps, options.rounds), indent=2))


@torch.no_grad()
def measure(tokens: int, steps: int, rounds: int) -> dict[str, Any]:
    """Ratios ours / stock as {"best", "rounds": [lowest, highest]}, and the milliseconds a call costs more."""
    result: dict[str, Any] = {}
    stock = build(SMOLLM2)
    for name, window, continued in (
        ("forward", tokens // 2, 0),
        ("continuation", 4 * tokens, steps),
        ("continuation_across_the_window", tokens + steps // 2, steps),
    ):
        seconds = alternating_seconds(pair(stock, window, tokens, continued), rounds, clock=time.process_time)
        result[name] = {
            "best": round(best_ratio(seconds, "ours", "stock"), 3),
            "rounds": [round(ratio, 3) for ratio in ratio_spread(seconds, "ours", "stock")],
        }
    calls = 10 * steps
    seconds = alternating_seconds(pair(build(TINY), 4 * calls, 1, calls), rounds, clock=time.process_time)
    result["milliseconds_a_call"] = round(1000 * (min(seconds["ours"]) - min(seconds["stock"])) / calls, 3)
    return result


def pair(stock: Any, window: int, tokens: int, continued: int) -> dict[str, Callable[[], object]]:
    """The same work on a copy under the loader and on `stock`."""
    ours = load(copy.deepcopy(stock), record(window))
    ids = torch.randint(3, 64, (1, tokens), generator=torch.Generator().manual_seed(0))
    return {"ours": lambda: run(ours, ids, continued), "stock": lambda: run(stock, ids, continued)}


def run(model: Any, ids: torch.Tensor, steps: int) -> None:
    """One forward without cache, or a prefill and `steps` single tokens with one."""
    cache = model(input_ids=ids, use_cache=steps > 0, logits_to_keep=1).past_key_values
    for _ in range(steps):
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)


def record(window: int) -> RopeScaling:
    """A record for both shapes that switches after `window` tokens."""
    return RopeScaling(
        rope_theta=THETA, rotary_dim=64, original_max_position_embeddings=window,
        max_position_embeddings=4 * window, long_factor=(4.0,) * 32,
    )  # fmt: skip


def build(shape: dict[str, int]) -> Any:
    """A random Llama with heads of 64."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, tie_word_embeddings=True, max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    main()
