"""transformers' Trainer for long rows: it sets the rotation token by token, and its loss is exact over any split of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from longrope_export.errors import InputFileError, NumericalError
from longrope_export.training.batches import collate
from longrope_export.training.checkpoints import Checkpoints
from longrope_export.training.heldout import HeldOut
from longrope_export.training.parameters import trained_weights
from longrope_export.training.positions import IGNORED, Example
from longrope_export.training.processes import parts_of_a_row
from longrope_export.training.reporting import Rate
from longrope_export.training.rotation import TrainingRotation

# `pattern(documents [B, T])` is what the training-time attention needs for a batch.
PatternOf = Callable[[Tensor], Any]
WEIGHTS = "trained.safetensors"


class LongTrainer(Trainer):  # type: ignore[misc]  # transformers is not typed
    """Trains `model` (under `summed_loss`) on `examples`, in their order.

    The loss of a step is the sum over its labels divided by their number, over all micro-batches and processes.
    Checkpoints go through `checkpoints`. Raises `NumericalError` when the loss is not finite.
    """

    control: Any  # mypy cannot tell from what it is assigned

    def __init__(
        self,
        model: Any,
        args: TrainingArguments,
        examples: Dataset[Example],
        *,
        rotation: TrainingRotation,
        pattern: PatternOf,
        checkpoints: Checkpoints,
        held_out: HeldOut | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        super().__init__(model, args, train_dataset=examples, eval_dataset=held_out, callbacks=callbacks)
        # transformers' own lines and bars; ours come as callbacks.
        for callback in (PrinterCallback, ProgressCallback):
            self.remove_callback(callback)
        self.rotation, self.pattern, self.checkpoints, self.held_out = rotation, pattern, checkpoints, held_out
        self._tokens_done, self._rate = 0, Rate()
        # `compute_loss` divides by the step's labels: Trainer must not divide by the micro-batches again.
        self.loss_is_scaled_for_ga, self.model_accepts_loss_kwargs = True, True

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Rows in the order of their numbers: step k takes rows k·batch … (k+1)·batch-1 on any number of processes."""
        loader = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            shuffle=False,
            collate_fn=collate,
            pin_memory=self.args.device.type == "cuda",
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def get_batch_samples(
        self, epoch_iterator: Iterator[Mapping[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[Mapping[str, Tensor]], Tensor]:
        """The micro-batches of a step, and the labels that are scored in all of them, on all processes."""
        batches = list(islice(epoch_iterator, num_batches))
        counts = torch.tensor(
            [
                sum(int((batch["labels"] != IGNORED).sum()) for batch in batches),
                sum(batch["labels"].numel() for batch in batches),
            ],
            device=device,
        )
        scored, tokens = self.accelerator.reduce(counts).tolist()
        # Processes that share a row have all counted it.
        parts = parts_of_a_row()
        self._tokens_done += tokens // parts
        return batches, torch.tensor(max(scored // parts, 1), device=device)

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This micro-batch's share of the step's mean loss, times the processes: DDP and FSDP average gradients."""
        self.rotation.choose(inputs["long"])
        pattern = self.pattern(inputs["documents"])
        outputs = model(
            input_ids=inputs["input_ids"],
            position_ids=inputs["position_ids"],
            labels=inputs["labels"],
            use_cache=False,
            **({} if pattern is None else {"longrope_pattern": pattern}),
        )
        share = outputs.total / (outputs.count if num_items_in_batch is None else num_items_in_batch)
        loss = share * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Perplexities on the held-out documents, which are logged too."""
        if self.held_out is None:
            return {}
        # FSDP gathers its shards in the wrapped model's forward; DDP needs no synchronisation here.
        model = self.model_wrapped if self.is_fsdp_enabled else self.model
        training = model.training
        model.eval()
        try:
            with self._rate.paused():
                metrics = self.held_out.measure(model, self.rotation, self.accelerator)
        finally:
            model.train(training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what counts here to Trainer's numbers; a loss that is not finite ends the run."""
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise NumericalError(
                f"the loss of step {self.state.global_step} is not finite; lower --learning-rate, or try --dtype "
                "float32 (the last checkpoint is kept)"
            )
        if loss is not None:
            logs["tokens_per_second"] = self._rate.read(self._tokens_done)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights, as they are in memory; FSDP's shards are written with the optimizer's."""
        if self.args.should_save and not self.is_fsdp_enabled:
            tensors = {name: weight.detach().contiguous() for name, weight in trained_weights(self.model).items()}
            save_file(tensors, Path(output_dir or self.args.output_dir) / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer's own loads what it finds, without a word about what is missing, and PEFT's adapters in their own way.
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved, weights = load_file(Path(resume_from_checkpoint) / WEIGHTS), trained_weights(self.model)
        if saved.keys() != weights.keys():
            raise InputFileError(f"{resume_from_checkpoint} holds other weights than are trained; name another --out")
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(saved[name])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._check_weights()
        step = self.state.global_step
        with self._rate.paused(), self.checkpoints.writing(step) as partial, self._output_to(partial):
            super()._save_checkpoint(model, trial)

    def _check_weights(self) -> None:
        # Also between two logged losses: the checkpoint before is the last good one.
        for name, weight in trained_weights(self.model).items():
            mine = weight.to_local() if hasattr(weight, "to_local") else weight
            if not bool(torch.isfinite(mine).all()):
                raise NumericalError(
                    f"{name} is not finite after step {self.state.global_step}; lower --learning-rate, or try --dtype "
                    "float32 (the last checkpoint is kept)"
                )

    @contextmanager
    def _output_to(self, folder: Path) -> Iterator[None]:
        kept, self.args.output_dir = self.args.output_dir, str(folder)
        try:
            yield
        finally:
            self.args.output_dir = kept
