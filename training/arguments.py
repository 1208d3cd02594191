"""Our options as transformers' `TrainingArguments`, the only place that knows its names."""

from __future__ import annotations

from typing import Any

from longrope_export.errors import LongRopeError, MissingDependencyError
from longrope_export.training.config import ADAM_BETAS, FinetuneConfig
from longrope_export.training.processes import parts_of_a_row, process_count

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def training_arguments(config: FinetuneConfig) -> Any:
    """The arguments of `config`; under a launcher this sets torch.distributed up.

    Raises `LongRopeError` for a batch that the processes cannot share, an unknown --report-to, and
    `MissingDependencyError` where an optimizer or a reporter needs a package.
    """
    import torch
    from transformers import TrainingArguments

    _check_reporters(config.report_to)
    arguments = TrainingArguments(
        output_dir=str(config.out),
        max_steps=config.steps,
        per_device_train_batch_size=config.micro_batch,
        gradient_accumulation_steps=accumulation(config, process_count()),
        learning_rate=config.rate,
        lr_scheduler_type=SCHEDULES[config.schedule],
        warmup_steps=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        optim=config.optimizer,
        adam_beta1=ADAM_BETAS[0],
        adam_beta2=ADAM_BETAS[1],
        seed=config.seed,
        bf16=uses_bfloat16(config.dtype),
        use_cpu=not _has_accelerator(),
        save_strategy="steps",
        save_steps=config.save_every,
        eval_strategy="steps",
        eval_steps=config.eval_every,
        logging_strategy="steps",
        logging_steps=config.log_every,
        # A loss that is not finite ends the run; Trainer would show the mean of earlier ones instead.
        logging_nan_inf_filter=False,
        report_to=list(config.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        # Every trained weight takes part in every loss.
        ddp_find_unused_parameters=False,
    )
    # Several GPUs in one process would be DataParallel, which splits rows' rotations wrongly: a launcher uses them all.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    _check_optimizer(arguments)
    return arguments


def set_threads(count: int | None) -> None:
    """Let torch use `count` CPU threads; None leaves its own choice."""
    import torch

    if count is not None:
        torch.set_num_threads(count)


def accumulation(config: FinetuneConfig, processes: int) -> int:
    """Micro-batches of one step in each process; raises `LongRopeError` when the rows cannot be shared evenly."""
    at_once = config.micro_batch * processes // parts_of_a_row()
    if config.batch % at_once:
        raise LongRopeError(
            f"--batch {config.batch} cannot be shared evenly by {processes} processes of --micro-batch "
            f"{config.micro_batch}; give a multiple of {at_once}"
        )
    return config.batch // at_once


def uses_bfloat16(dtype: str) -> bool:
    """Whether weights stay in float32 and the computation is bfloat16: always "bfloat16", and "auto" on a GPU with it."""
    import torch

    if dtype == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return dtype == "bfloat16"


def _has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _check_reporters(names: tuple[str, ...]) -> None:
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise LongRopeError(f"--report-to {name!r} is not known; choose from {known}")
        if name not in get_available_reporting_integrations():
            raise MissingDependencyError(f"--report-to {name} needs its package: pip install {name}")


def _check_optimizer(arguments: Any) -> None:
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise MissingDependencyError(f"--optimizer {arguments.optim.value} cannot be used here: {reason}") from error
