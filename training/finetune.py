"""`run`: a model, a record and texts in; a folder with the tuned model out, continued where it was stopped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.denormals import flushed_denormals
from longrope_export.training.allocator import limit_hoarding
from longrope_export.training.checkpoints import Checkpoints, check_identity, read_identity
from longrope_export.training.config import FinetuneConfig
from longrope_export.training.corpus import Corpus, read_corpus
from longrope_export.training.inputs import Inputs, check_inputs, check_output
from longrope_export.training.output import CHECKPOINTS, WORK, check_folder, finished, output_folder, remove_work
from longrope_export.training.processes import is_main, wait_for_all
from longrope_export.versions import versions

Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]


class FinetuneStopped(KeyboardInterrupt):
    """The run was stopped by the user, or the system; `checkpoint` tells whether the same command continues it."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step


@dataclass(frozen=True)
class FinetuneResult:
    """What a finished run left in `folder`; `summary` is its finetune.json."""

    folder: Path
    summary: Mapping[str, Any]


def run(config: FinetuneConfig, progress: Progress | None = None, say: Say | None = None) -> FinetuneResult:
    """Fine-tune `config.model` with its record and write the folder `config.out`; an unfinished run is continued.

    What is wrong with the input is found before the weights are read. Raises `LongRopeError` and its kinds, among them
    `StaleStateError` where the folder holds a run with another model, record, data or option; `FinetuneStopped` after
    Ctrl-C, when a checkpoint is written.
    """
    show, tell = progress or (lambda step, steps, status: None), say or (lambda line: None)
    check_output(config)
    inputs = check_inputs(config)
    for remark in inputs.remarks:
        tell(f"note: {remark}")
    _check_early(config, inputs)

    from longrope_export.training.arguments import set_threads, training_arguments

    limit_hoarding()
    set_threads(config.threads)
    arguments = training_arguments(config)
    corpus = read_corpus(config, inputs, config.out / WORK, show)
    for remark in corpus.remarks:
        tell(f"note: {remark}")
    identity = {**run_identity(config, inputs), "data": corpus.identity}
    if summary := finished(config.out, identity):
        wait_for_all()
        if is_main():
            remove_work(config.out)
        return FinetuneResult(config.out, summary)
    return _train(config, inputs, corpus, identity, arguments, show, tell)


def _check_early(config: FinetuneConfig, inputs: Inputs) -> None:
    """What does not need the texts: a folder of another run, LoRA targets that the model does not have."""
    from longrope_export.training.model import check_targets

    known = run_identity(config, inputs)
    check_folder(config.out, known)
    saved = Checkpoints(config.out / WORK / CHECKPOINTS, known).newest()
    if saved is not None:
        check_identity(read_identity(saved), known, saved)
    check_targets(config, inputs)


def run_identity(config: FinetuneConfig, inputs: Inputs) -> dict[str, Any]:
    """What a resumed run must share with its checkpoints, but for the data; JSON-ready."""
    from longrope_export.training.arguments import uses_bfloat16

    record = inputs.scaling.to_dict()
    del record["provenance"]
    return {
        "model": inputs.fingerprint,
        "record": record,
        "options": {
            **config.deciding(),
            "--length": inputs.positions.tokens,
            "--dtype": "bfloat16" if uses_bfloat16(config.dtype) else "float32",
        },
    }


def _train(
    config: FinetuneConfig,
    inputs: Inputs,
    corpus: Corpus,
    identity: Mapping[str, Any],
    arguments: Any,
    show: Progress,
    tell: Say,
) -> FinetuneResult:
    from longrope_export.training.model import TrainedModel
    from longrope_export.training.reporting import LogCallback, Stop, StopCallback

    checkpoints = Checkpoints(config.out / WORK / CHECKPOINTS, identity, main=is_main(), wait=wait_for_all)
    last = checkpoints.last()
    if last is not None:
        tell(f"continuing from {last.name.replace('checkpoint-', 'step ')}")
    show(0, 1, "loading the model")
    arguments.eval_on_start = last is None
    stop = Stop()
    stopping = StopCallback(stop)
    with ExitStack() as active:
        active.enter_context(flushed_denormals())
        trained = TrainedModel.load(config, inputs)
        active.enter_context(trained.training())
        active.enter_context(stop.listening(tell))
        shown = LogCallback(config.out, show, tell)
        trainer = trained.trainer(corpus, arguments, checkpoints, [stopping, shown])
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if stopping.stopped:
            raise FinetuneStopped(trainer.state.global_step)
        state = trained.final_state(trainer)
    summary = _summary(config, inputs, corpus, identity, trainer.state.log_history)
    if is_main():
        record = inputs.scaling.with_provenance(finetuned=_stage(config, corpus))
        with output_folder(config.out) as folder:
            trained.write(folder, state, corpus.tokenizer, record, summary)
    wait_for_all()
    return FinetuneResult(config.out, summary)


def _summary(
    config: FinetuneConfig, inputs: Inputs, corpus: Corpus, identity: Mapping[str, Any], history: list[dict[str, Any]]
) -> dict[str, Any]:
    """finetune.json: what the run was, and its first and last measures."""
    measured = [entry for entry in history if any(name.startswith("eval_") for name in entry)]
    return {
        "identity": dict(identity),
        "config": config.to_dict(),
        "rows": len(corpus.plan),
        "tokens": len(corpus.plan) * inputs.positions.tokens,
        "loss": next((entry["loss"] for entry in reversed(history) if "loss" in entry), None),
        "before": _measures(measured[:1]),
        "after": _measures(measured[-1:]),
        "versions": versions("accelerate", "peft"),
    }


def _measures(entries: list[dict[str, Any]]) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): value
        for entry in entries
        for name, value in entry.items()
        if name.startswith("eval_")
    }


def _stage(config: FinetuneConfig, corpus: Corpus) -> dict[str, Any]:
    """What the record says about the weights that it now belongs to."""
    return {**config.deciding(), "data": corpus.identity["tokens"]}
