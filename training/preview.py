"""`--dry-run`: what a run would be, with its memory and time from two probe steps; nothing is written."""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from longrope_export.denormals import flushed_denormals
from longrope_export.training.allocator import limit_hoarding
from longrope_export.training.arguments import accumulation, set_threads, training_arguments
from longrope_export.training.checkpoints import Checkpoints
from longrope_export.training.config import FinetuneConfig
from longrope_export.training.corpus import Corpus, read_corpus
from longrope_export.training.inputs import Inputs, check_inputs, check_output
from longrope_export.training.model import TrainedModel, check_targets
from longrope_export.training.processes import process_count

_PROBE_STEPS = 2
# AdamW keeps two numbers for each trained weight, and backward one gradient; all are float32.
_STATE_BYTES = 4 + 8


@dataclass(frozen=True)
class Preview:
    """A run before it begins. `state_bytes` are weights, gradients and AdamW's state; `peak_bytes` what the probe took in
    all, on the GPU where there is one; `checkpoint_bytes` what a checkpoint needs on the disk.
    """

    window: int
    target: int
    row_tokens: int
    rows: int
    tokens: int
    tokens_per_step: int
    passes: float
    documents: int
    held_out: int
    trained_parameters: int
    parameters: int
    seconds_per_step: float
    seconds: float
    state_bytes: int
    peak_bytes: int | None
    checkpoint_bytes: int
    config: dict[str, Any]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The preview for people."""
        giga = 1 << 30
        peak = "" if self.peak_bytes is None else f"; a probe took {self.peak_bytes / giga:.2f} GiB in all"
        steps = self.config["steps"]
        return [
            f"window {self.window:,} → {self.target:,} tokens; {self.config['positions']} positions in rows of "
            f"{self.row_tokens:,} tokens, {self.config['attention']} attention",
            f"{steps:,} steps of {self.config['batch']} rows: {self.tokens_per_step:,} tokens a step, "
            f"{self.tokens:,} in all, {self.passes:.2f} passes over {self.documents:,} documents; {self.held_out} held out",
            f"trained: {self.trained_parameters:,} of {self.parameters:,} weights ({self.config['train']})",
            f"memory: {self.state_bytes / giga:.2f} GiB of weights, gradients and optimizer state{peak}; "
            f"a checkpoint takes {self.checkpoint_bytes / giga:.2f} GiB on the disk",
            f"time: {self.seconds_per_step:.1f} s a step, {_duration(self.seconds)} in all, without measurements",
            *(f"note: {remark}" for remark in self.remarks),
        ]


def preview(config: FinetuneConfig) -> Preview:
    """The plan of `config`: texts are tokenised (into `config.cache`, or for the moment) and two small steps made.

    Raises what `run` raises before it begins to train.
    """
    check_output(config)
    inputs = check_inputs(config)
    check_targets(config, inputs)
    limit_hoarding()
    set_threads(config.threads)
    with flushed_denormals(), tempfile.TemporaryDirectory() as folder:
        corpus = read_corpus(config, inputs, Path(folder), lambda done, everything, status: None)
        each = accumulation(config, process_count())
        probe = replace(
            config, out=Path(folder) / "out", steps=_PROBE_STEPS, batch=config.batch // each, warmup=0,
            save_every=_PROBE_STEPS + 1, eval_every=_PROBE_STEPS + 1, report_to=(),
        )  # fmt: skip
        trained = TrainedModel.load(probe, inputs)
        seconds = _probe(probe, corpus, trained, Path(folder)) * each
    return _preview(config, inputs, corpus, trained.model, seconds)


def _probe(config: FinetuneConfig, corpus: Corpus, trained: TrainedModel, folder: Path) -> float:
    """Seconds of the last of a few steps of one micro-batch each: the first one also warms up."""
    clock = _Clock()
    arguments = training_arguments(config)
    arguments.save_strategy = arguments.eval_strategy = "no"
    with ExitStack() as active:
        active.enter_context(trained.training())
        trained.trainer(corpus, arguments, Checkpoints(folder / "checkpoints", {}), [clock]).train()
    return clock.seconds[-1]


class _Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def _preview(config: FinetuneConfig, inputs: Inputs, corpus: Corpus, model: Any, seconds: float) -> Preview:
    weights = list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    plan, tokens = corpus.plan, inputs.positions.tokens
    return Preview(
        window=inputs.window,
        target=inputs.target,
        row_tokens=tokens,
        rows=len(plan),
        tokens=len(plan) * tokens,
        tokens_per_step=config.batch * tokens,
        passes=len(plan) / plan.rows_of_one_pass,
        documents=int(corpus.identity["documents"]),
        held_out=len(corpus.held),
        trained_parameters=trained,
        parameters=sum(weight.numel() for weight in weights),
        seconds_per_step=seconds,
        seconds=seconds * config.steps,
        state_bytes=sum(weight.numel() * weight.element_size() for weight in weights) + trained * _STATE_BYTES,
        peak_bytes=_peak_bytes(),
        checkpoint_bytes=trained * 12,
        config=config.to_dict(),
        remarks=(*inputs.remarks, *corpus.remarks),
    )


def _peak_bytes() -> int | None:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes everywhere but on macOS.
    return peak if sys.platform == "darwin" else peak * 1024


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"
