"""What torch.compile gains a search: a forward pass and a gradient of the demo model, eager against compiled.

    python benchmarks/compile_gain.py [--length 2048] [--rounds 7] [--model MODEL]

The layers are compiled and the rotary embedding is not, so that another candidate is not another graph; every call takes
another candidate. In every round each variant runs once, in another order. Times are processor seconds of one thread, the
best of each counts. The first compiled call is reported apart: `breaks even` is the number of passes that it costs more than
compiled passes save.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
# A cached kernel would hide what compiling costs.
os.environ |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import torch
from common import alternating_seconds, machine

from longrope_export.demo import demo_model_path
from longrope_export.description import describe
from longrope_export.evaluation.documents import load_tokenizer
from longrope_export.evaluation.run import standard_library_rows
from longrope_export.loader import load
from longrope_export.rotary import decoder_of
from longrope_export.search.objective import ModelObjective
from longrope_export.search.protocol import SEARCH, Trial
from longrope_export.search.run import numbers_of
from longrope_export.search.space import Candidate, RopeNumbers

DTYPES = (torch.float32, torch.bfloat16)


def opened(path: Path, length: int, dtype: torch.dtype, *, compiled: bool) -> ModelObjective:
    """The objective on one row of the standard library, with the model's layers compiled or not."""
    (row,) = standard_library_rows(load_tokenizer(path), length, 1)
    model = load(path, dtype=dtype)
    if compiled:
        decoder: Any = decoder_of(model)
        for layer in decoder.layers:
            layer.compile()
    return ModelObjective(model, numbers_of(describe(path), str(length)), {SEARCH: [row.token_ids]})


def candidates(numbers: RopeNumbers) -> Iterator[Candidate]:
    """One candidate after the other, none twice."""
    for index in itertools.count():
        yield Candidate(tuple(1.0 + 0.01 * index * pair for pair in range(numbers.pairs)), 1.0 + 0.001 * index)


def run(objective: ModelObjective, stream: Iterator[Candidate], gradient: bool) -> float:
    """The loss of the stream's next candidate, with or without its gradient."""
    return objective.measure(Trial(next(stream), SEARCH, 0, gradient)).loss


def processor_seconds() -> float:
    """Of this process and of the C++ compilers that it started."""
    return sum(os.times()[:4])


def report(name: str, dtype: torch.dtype, runs: Mapping[str, Callable[[], float]], rounds: int) -> float:
    """Print one line; the best eager seconds."""
    runs["eager"]()
    started = processor_seconds()
    runs["compiled"]()
    first = processor_seconds() - started
    best = {each: min(found) for each, found in alternating_seconds(runs, rounds, time.process_time).items()}
    saved = best["eager"] - best["compiled"]
    even = f"breaks even after {(first - best['compiled']) / saved:,.0f} passes" if saved > 0 else "never breaks even"
    print(
        f"{str(dtype).removeprefix('torch.'):>8} {name:<8} eager {best['eager']:.3f} s, compiled "
        f"{best['compiled'] / best['eager']:.2f} x, first call {first:.1f} s, {even}",
        flush=True,
    )
    return best["eager"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_model_path())
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{options.model.name} at {options.length:,} tokens; torch {torch.__version__}; {machine()}")
    eager: dict[tuple[str, torch.dtype], float] = {}
    for dtype in DTYPES:
        pair = {
            name: opened(options.model, options.length, dtype, compiled=name == "compiled")
            for name in ("eager", "compiled")
        }
        same = [each.measure(Trial(next(candidates(each._numbers)), SEARCH, 0)).loss for each in pair.values()]
        print(f"{str(dtype).removeprefix('torch.'):>8} losses differ by {abs(same[0] - same[1]):.1e} nats")
        for name, gradient in (("forward", False), ("gradient", True)):
            torch._dynamo.reset()
            runs = {
                each: partial(run, objective, candidates(objective._numbers), gradient)
                for each, objective in pair.items()
            }
            eager[name, dtype] = report(name, dtype, runs, options.rounds)
    for name in ("forward", "gradient"):
        print(f"bfloat16 over float32, eager {name}: {eager[name, DTYPES[1]] / eager[name, DTYPES[0]]:.2f} x")


if __name__ == "__main__":
    main()
