"""What flushing denormal floats does to a descent step: processor time of a loss and of its gradient, with and without.

    python benchmarks/denormals.py [MODEL] [--lengths 2048,8192,16384] [--dtypes float32] [--rounds 1] [--threads 1]

Each cell is measured in a process of its own, on the first rows of the standard library's `validation` documents with
YaRN's factors; losses and gradients of both are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from common import machine, run_child

from longrope_export.demo import demo_model_path


def main() -> None:
    """Measure one cell here, or start one process per cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo_model_path())
    parser.add_argument("--lengths", default="2048,8192,16384")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", default="1")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        dtype, length, flush = options.child.split(":")
        print(json.dumps(_child(options.model, dtype, int(length), flush == "flushed", options.rounds)))
        return
    print(f"{machine()}; {options.model.name}, {options.threads} threads")
    for dtype in options.dtypes.split(","):
        for length in options.lengths.split(","):
            found = [_cell(options, f"{dtype}:{length}:{flush}") for flush in ("kept", "flushed")]
            print(_line(dtype, int(length), *found), flush=True)


def _cell(options: argparse.Namespace, child: str) -> Any:
    command = [sys.executable, __file__, str(options.model), "--rounds", str(options.rounds), "--child", child]
    output, _, _ = run_child(command, environment={"OMP_NUM_THREADS": options.threads})
    return json.loads(output.strip().splitlines()[-1])


def _line(dtype: str, length: int, kept: Any, flushed: Any) -> str:
    largest = max(map(abs, kept["slope"]))
    apart = max(abs(one - other) for one, other in zip(kept["slope"], flushed["slope"])) / largest
    return (
        f"{dtype} {length:>6,} tokens: loss {kept['loss']:.1f} s, flushed {flushed['loss'] / kept['loss']:.2f} of it; "
        f"gradient {kept['gradient']:.1f} s, flushed {flushed['gradient'] / kept['gradient']:.2f}; gradient over loss "
        f"{kept['gradient'] / kept['loss']:.1f}, flushed {flushed['gradient'] / flushed['loss']:.1f}; losses "
        f"{abs(kept['value'] - flushed['value']):.1e} apart, gradients {apart:.1e} of the largest"
    )


def _child(path: Path, dtype: str, length: int, flush: bool, rounds: int) -> dict[str, Any]:
    import torch

    from longrope_export.denormals import flushed_denormals
    from longrope_export.description import describe
    from longrope_export.evaluation.documents import load_tokenizer
    from longrope_export.evaluation.stdlib_corpus import documents
    from longrope_export.loader import load
    from longrope_export.search.objective import ModelObjective
    from longrope_export.search.protocol import SEARCH, Trial
    from longrope_export.search.run import numbers_of
    from longrope_export.search.space import closed_form

    with flushed_denormals() if flush else contextlib.nullcontext():
        numbers = numbers_of(describe(path), str(max(length, 2 * describe(path).window)))
        tokenizer = load_tokenizer(path)
        ids = documents("validation", min_tokens=length, tokenize_text=tokenizer.encode)[0].text
        row = torch.tensor(tokenizer.encode(ids)[:length]).numpy()
        objective = ModelObjective(load(path, dtype=getattr(torch, dtype)), numbers, {SEARCH: (row,)})
        seconds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(rounds):
            for gradient, taken in seconds.items():
                started = time.process_time()
                found = objective.measure(Trial(closed_form("yarn", numbers, None), SEARCH, 0, gradient=gradient))
                taken.append(time.process_time() - started)
    return {"loss": min(seconds[False]), "gradient": min(seconds[True]), "value": found.loss, "slope": found.gradient}


if __name__ == "__main__":
    main()
