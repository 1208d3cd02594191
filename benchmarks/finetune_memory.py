"""Peak memory of one LoRA step at long lengths: the chunked loss against transformers' Trainer with its own.

    python benchmarks/finetune_memory.py [MODEL] [--lengths 8192,16384] [--dtypes float32,bfloat16] [--layers N]

Both sides are transformers' Trainer on the same row, LoRA and activation checkpointing; they differ in the loss, and in
the allocator's thresholds where each has its defaults: this project sets glibc's itself, Trainer leaves them alone. Every
step is made in a process of its own whose resident memory is watched: one that passes --limit gigabytes is stopped and
reported as out of memory. A shortened model (--layers) has the same embedding, lm_head and length, so that the losses cost
what they always do. Seconds are processor seconds of the step, with denormal floats flushed on both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import machine
from perplexity_cost import ONE_THREAD, default_model

BOUND_LENGTH, BOUND = 16384, 1 / 3
OURS, THEIRS = "chunked loss", "Trainer's loss"
# Side, whether the allocator is limited, and what that is called.
RUNS = (
    (OURS, True, "own default"),
    (THEIRS, True, "the same thresholds"),
    (THEIRS, False, "own default"),
)


@dataclass(frozen=True)
class Step:
    """One measured step; `peak` bytes, and `seconds` None when it was stopped at the limit."""

    peak: int
    loaded: int = 0
    loss: float = 0.0
    seconds: float | None = None


def main() -> None:
    """Measure one step here, or start one process per step and compare them."""
    options = _options()
    if options.child:
        _child(options)
        return
    if not Path("/proc/self/status").exists():
        raise SystemExit("memory is read from /proc/PID/status, which only Linux has")
    layers = f"{options.layers} layers" if options.layers else "all layers"
    print(f"{machine()}; {options.model.name}, {layers}, limit {options.limit:g} GB", flush=True)
    failed = False
    for dtype in options.dtypes.split(","):
        for length in map(int, options.lengths.split(",")):
            steps = []
            for side, limited, allocator in RUNS:
                steps.append(_measure(options, side, limited, dtype, length))
                said = describe(steps[-1], options.limit)
                print(f"{dtype} {length:>6,} tokens, {layers}: {side:<14} ({allocator}): {said}", flush=True)
            for (_, _, allocator), step in zip(RUNS[1:], steps[1:]):
                ratio, at_most = ratio_of(steps[0], step)
                print(f"    ratio with {allocator} of Trainer: {'at most ' if at_most else ''}{ratio:.2f}", flush=True)
                failed |= length == BOUND_LENGTH and ratio > BOUND
    if failed:
        raise SystemExit(f"over the bound of {BOUND:.2f} at {BOUND_LENGTH:,} tokens")


def ratio_of(ours: Step, theirs: Step) -> tuple[float, bool]:
    """Our peak over theirs, and whether it is only a bound because theirs did not fit."""
    return (ours.peak / theirs.peak if ours.seconds is not None else float("inf")), theirs.seconds is None


def describe(step: Step, limit: float) -> str:
    """One step in words."""
    if step.seconds is None:
        return f"out of memory (over {limit:g} GB)"
    return (
        f"peak {step.peak / 1e9:.2f} GB (loaded: {step.loaded / 1e9:.2f}), {step.seconds:.1f} s, loss {step.loss:.4f}"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=None)
    parser.add_argument("--lengths", default="8192,16384")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--layers", type=int, help="keep only the first N layers")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--limit", type=float, default=12.0, help="gigabytes at which a step is stopped")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.model = options.model or default_model()
    return options


def _measure(options: argparse.Namespace, side: str, limited: bool, dtype: str, length: int) -> Step:
    job = json.dumps([side, limited, dtype, length])
    command = [sys.executable, __file__, str(options.model), "--rank", str(options.rank), "--child", job]
    if options.layers:
        command += ["--layers", str(options.layers)]
    output, code, peak = watched(command, int(options.limit * 1e9))
    if code == -signal.SIGKILL and peak > options.limit * 1e9:
        return Step(peak)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with code {code}")
    loss, seconds, loaded, peak = json.loads(output.strip().splitlines()[-1])
    return Step(peak, loaded, loss, seconds)


def watched(command: list[str], limit: int) -> tuple[str, int, int]:
    """Run `command`; its stdout, exit code and peak resident bytes as seen from here.

    It is killed within moments of holding more than `limit`; the code is then -9.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_THREAD}) as process:
        seen: list[int] = [0]
        watcher = threading.Thread(target=_watch, args=(process, limit, seen))
        watcher.start()
        output, _ = process.communicate()
        watcher.join()
    return output, process.returncode, seen[-1]


def _watch(process: subprocess.Popen[str], limit: int, seen: list[int]) -> None:
    while process.returncode is None:
        # A process that has ended, and waits to be asked for its code, has no memory any more.
        seen.append(max(seen[-1], resident_bytes(process.pid, "VmHWM")))
        if resident_bytes(process.pid) > limit:
            process.kill()
        time.sleep(0.02)


def resident_bytes(process: int, name: str = "VmRSS") -> int:
    """Resident memory of a process, or with VmHWM its highest value so far; 0 when it has ended.

    `wait4` would count the parent's peak too, which a child inherits until it runs its own program.
    """
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(f"{name}:")), 0)


def _child(options: argparse.Namespace) -> None:
    side, limited, dtype, length = json.loads(options.child)
    if limited:
        from longrope_export.training.allocator import limit_hoarding

        limit_hoarding()
    import torch

    from longrope_export.denormals import flushed_denormals

    torch.manual_seed(0)
    model = _shortened_lora(options, dtype)
    ids = torch.randint(0, model.config.vocab_size, (1, length))
    loaded = resident_bytes(os.getpid())
    started = time.process_time()
    with flushed_denormals():
        loss = _trainer_step(model, ids, side)
    print(json.dumps([loss, time.process_time() - started, loaded, resident_bytes(os.getpid(), "VmHWM")]))


def _shortened_lora(options: argparse.Namespace, dtype: str) -> Any:
    import torch

    from longrope_export.loader import load
    from longrope_export.training.parameters import LoraOptions, make_trainable

    model: Any = load(options.model, dtype=getattr(torch, dtype))
    if options.layers:
        model.model.layers = model.model.layers[: options.layers]
        model.config.num_hidden_layers = options.layers
    return make_trainable(model, "lora", LoraOptions(rank=options.rank))


def _trainer_step(model: Any, ids: Any, side: str) -> float:
    """One step of Trainer on one row; its loss."""
    import tempfile

    from torch.nn import functional
    from transformers import Trainer, TrainingArguments, default_data_collator

    from longrope_export.training.loss import summed_loss

    class SummedTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            shifted = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
            found = model(input_ids=inputs["input_ids"], labels=shifted)
            return found.total / found.count

    with tempfile.TemporaryDirectory() as folder, summed_loss(model) if side == OURS else contextlib.nullcontext():
        arguments = TrainingArguments(
            output_dir=folder, max_steps=1, per_device_train_batch_size=1, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, remove_unused_columns=False, activation_checkpointing=True,
        )  # fmt: skip
        rows = [{"input_ids": ids[0], "labels": ids[0]}]
        kind = SummedTrainer if side == OURS else Trainer
        trainer = kind(model, arguments, train_dataset=rows, data_collator=default_data_collator)
        # stdout is the parent's: Trainer prints its results there.
        with contextlib.redirect_stdout(sys.stderr):
            return float(trainer.train().training_loss)


if __name__ == "__main__":
    main()
