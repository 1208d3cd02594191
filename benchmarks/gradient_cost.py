"""What a search's evaluation and a descent step cost: times against forward passes, and peak memory at 16,384 tokens.

    python benchmarks/gradient_cost.py [MODEL] [--lengths 2048,4096,8192] [--dtypes float32,bfloat16] [--rounds 3]
    python benchmarks/gradient_cost.py [MODEL] --memory 16384

An evaluation is the loss of one document as a search takes it, a step its gradient in (log λ …, log m) too, with recomputed
layers. The bare forward pass is the model's body and its lm_head on the same chunks, every chunk's logits thrown away. Times are
processor seconds of one thread, the best of the rounds; memory is the peak of a process of its own. Exit 1 above a bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from common import alternating_seconds, best_ratio, machine, run_child
from perplexity_cost import ONE_THREAD, TIME_BOUND, default_model

from longrope_export.denormals import flushed_denormals

STEP_BOUND, MEMORY_BOUND = 4.2, 6e9


def main() -> int:
    """Measure one length here, or start one process per measurement; 1 when a bound is exceeded."""
    options = _options()
    if options.child:
        dtype, length = options.child.split(":")
        print(json.dumps(_child(options.model, dtype, int(length), options.rounds)))
        return 0
    print(machine())
    base = [sys.executable, __file__, str(options.model), "--rounds", str(options.rounds), "--child"]
    if options.memory:
        output, _, peak = run_child([*base, f"bfloat16:{options.memory}"], environment=ONE_THREAD)
        failed = _above(f"bfloat16 {options.memory:,} tokens", json.loads(output.splitlines()[-1]))
        print(f"peak memory {peak / 1e9:.2f} GB (bound {MEMORY_BOUND / 1e9:.0f} GB)")
        return int(failed or peak > MEMORY_BOUND)
    failed = False
    for dtype in options.dtypes.split(","):
        for length in options.lengths.split(","):
            output, _, _ = run_child([*base, f"{dtype}:{length}"], environment=ONE_THREAD)
            failed |= _above(f"{dtype} {int(length):,} tokens", json.loads(output.splitlines()[-1]))
    return int(failed)


def _above(name: str, seconds: dict[str, list[float]]) -> bool:
    """Print both ratios of one measurement; whether one is above its bound."""
    evaluation, step = best_ratio(seconds, "evaluation", "bare"), best_ratio(seconds, "step", "evaluation")
    print(
        f"{name}: an evaluation {min(seconds['evaluation']):.2f} s, {evaluation:.3f} bare forward passes (bound {TIME_BOUND}); "
        f"a step {min(seconds['step']):.2f} s, {step:.2f} evaluations (bound {STEP_BOUND})",
        flush=True,
    )
    return evaluation > TIME_BOUND or step > STEP_BOUND


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=None)
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", type=int)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or default_model()
    return options


@flushed_denormals()  # as in a search
def _child(path: Path, dtype: str, length: int, rounds: int) -> dict[str, list[float]]:
    import torch

    from longrope_export.description import describe
    from longrope_export.evaluation.documents import load_tokenizer
    from longrope_export.evaluation.losses import body_states, head_logits
    from longrope_export.evaluation.run import standard_library_rows
    from longrope_export.loader import load
    from longrope_export.search.memory import CHUNK
    from longrope_export.search.objective import ModelObjective
    from longrope_export.search.protocol import SEARCH, Trial
    from longrope_export.search.run import numbers_of
    from longrope_export.search.space import closed_form

    (row,) = standard_library_rows(load_tokenizer(path), length, 1)
    numbers = numbers_of(describe(path), "2x")
    model: Any = load(path, dtype=getattr(torch, dtype))
    objective = ModelObjective(model, numbers, {SEARCH: [row.token_ids]}, recompute=True)
    candidate = closed_form("yarn", numbers)
    ids = torch.from_numpy(row.token_ids)[None]

    def bare() -> None:
        with torch.no_grad():
            for states in torch.split(body_states(model, ids)[0, :-1], CHUNK):
                head_logits(model, states)

    runs = {
        "bare": bare,
        "evaluation": lambda: objective.measure(Trial(candidate, SEARCH, 0, False)),
        "step": lambda: objective.measure(Trial(candidate, SEARCH, 0, True)),
    }
    return alternating_seconds(runs, rounds, clock=time.process_time)


if __name__ == "__main__":
    sys.exit(main())
