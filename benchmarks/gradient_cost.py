"""What one descent step costs: time against the same forward pass, and peak memory at 16,384 tokens.

    python benchmarks/gradient_cost.py [MODEL] [--lengths 2048,4096,8192] [--dtypes float32,bfloat16] [--rounds 3]
    python benchmarks/gradient_cost.py [MODEL] --memory 16384

A step is the loss of one document and its gradient in (log λ …, log m), with recomputed layers; a forward pass is the loss
alone. Times are processor seconds of one thread, the best of the rounds; memory is the peak of a process of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from common import alternating_seconds, best_ratio, machine, run_child
from perplexity_cost import ONE_THREAD, default_model

TIME_BOUND, MEMORY_BOUND = 4.2, 6e9


def main() -> None:
    """Measure one length here, or start one process per measurement."""
    options = _options()
    if options.child:
        dtype, length = options.child.split(":")
        _child(options.model, dtype, int(length), options.rounds)
        return
    print(machine())
    base = [sys.executable, __file__, str(options.model), "--rounds", str(options.rounds), "--child"]
    if options.memory:
        output, _, peak = run_child([*base, f"bfloat16:{options.memory}"], environment=ONE_THREAD)
        print(f"{output.strip()}; peak memory {peak / 1e9:.2f} GB (bound {MEMORY_BOUND / 1e9:.0f} GB)")
        return
    for dtype in options.dtypes.split(","):
        for length in options.lengths.split(","):
            output, _, _ = run_child([*base, f"{dtype}:{length}"], environment=ONE_THREAD)
            print(f"{output.strip()} (bound {TIME_BOUND})", flush=True)


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


def _child(path: Path, dtype: str, length: int, rounds: int) -> None:
    import torch

    from longrope_export.description import describe
    from longrope_export.evaluation.documents import load_tokenizer
    from longrope_export.evaluation.run import standard_library_rows
    from longrope_export.loader import load
    from longrope_export.search.objective import ModelObjective
    from longrope_export.search.protocol import SEARCH, Trial
    from longrope_export.search.run import numbers_of
    from longrope_export.search.space import closed_form

    (row,) = standard_library_rows(load_tokenizer(path), length, 1)
    numbers = numbers_of(describe(path), "2x")
    model: Any = load(path, dtype=getattr(torch, dtype))
    objective = ModelObjective(model, numbers, {SEARCH: [row.token_ids]}, recompute=True)
    candidate = closed_form("yarn", numbers)

    def run(gradient: bool) -> None:
        objective.measure(Trial(candidate, SEARCH, 0, gradient))

    runs = {"forward": lambda: run(False), "step": lambda: run(True)}
    seconds = alternating_seconds(runs, rounds, clock=time.process_time)
    ratio = best_ratio(seconds, "step", "forward")
    print(f"{dtype} {length:,} tokens: a step takes {min(seconds['step']):.1f} s, {ratio:.2f} forward passes")


if __name__ == "__main__":
    main()
