"""The demo model's training loop: Muon and AdamW, bfloat16, micro-batches on threads, checkpoints that survive a kill."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from longrope_export.errors import StaleStateError
from longrope_export.files import atomic_output

Batch = Callable[[int], tuple[Tensor, Tensor]]
DECAY_SHARE = 0.3


@dataclass(frozen=True)
class Settings:
    """What decides the weights; a checkpoint made with others is refused. `data` is a hash of the training text.

    Only `steps` may differ at a resume: before the rate has begun to fall, it decides nothing that was done.
    """

    steps: int = 4000
    rows: int = 16
    micro_rows: int = 8
    learning_rate: float = 4e-3
    warm_up: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    data: str = ""


@dataclass
class Progress:
    """Where the run stands; `seconds` counts all sittings, `decay_start` is the step where the rate begins to fall."""

    step: int = 0
    seconds: float = 0.0
    decay_start: int | None = None
    loss: float = math.nan

    def total(self, steps: int) -> int:
        """Steps of the whole run: `steps` until the decay has begun, then what the decay's start implies."""
        return steps if self.decay_start is None else math.ceil(self.decay_start / (1 - DECAY_SHARE))


def learning_rate(settings: Settings, progress: Progress) -> float:
    """Warm-up, constant, then linear to zero over the last `DECAY_SHARE` of the run."""
    total = progress.total(settings.steps)
    start = progress.decay_start if progress.decay_start is not None else total
    fall = (total - progress.step) / max(1, total - start)
    return settings.learning_rate * min(1.0, (progress.step + 1) / settings.warm_up, fall)


def optimizers(model: nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(
            matrices,
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def train(
    model: nn.Module,
    batch: Batch,
    settings: Settings,
    checkpoint: Path,
    *,
    minutes: float | None = None,
    threads: int = 2,
    checkpoint_every: float = 60.0,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Train `model` in place on `batch(step)` (ids and weights, [rows, window + 1]) and return where the run ended.

    A checkpoint file is read when it exists, and written every `checkpoint_every` seconds and at the end. With
    `minutes`, the rate begins to fall when 70 % of that time has gone, if that is before 70 % of the steps. The
    weights depend on the settings and the steps, not on `threads` nor on where a run was interrupted. Raises
    `StaleStateError` when the checkpoint was made with other settings.
    """
    optimizing = optimizers(model, settings)
    progress = _read_checkpoint(checkpoint, model, optimizing, settings)
    before, begun, saved = progress.seconds, time.monotonic(), time.monotonic()
    with ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
        while progress.step < progress.total(settings.steps):
            if progress.decay_start is None and _decay_is_due(progress, settings, minutes):
                progress.decay_start = progress.step
            progress.loss = _step(
                model, optimizing, batch(progress.step), settings, learning_rate(settings, progress), pool
            )
            progress.step += 1
            progress.seconds = before + time.monotonic() - begun
            report(progress)
            if time.monotonic() - saved > checkpoint_every:
                _write_checkpoint(checkpoint, model, optimizing, settings, progress)
                saved = time.monotonic()
    _write_checkpoint(checkpoint, model, optimizing, settings, progress)
    return progress


def _one_thread() -> None:
    torch.set_num_threads(1)


def _decay_is_due(progress: Progress, settings: Settings, minutes: float | None) -> bool:
    share = progress.step / settings.steps
    if minutes is not None:
        share = max(share, progress.seconds / (60 * minutes))
    return share >= 1 - DECAY_SHARE


def _step(
    model: nn.Module,
    optimizing: list[torch.optim.Optimizer],
    data: tuple[Tensor, Tensor],
    settings: Settings,
    rate: float,
    pool: ThreadPoolExecutor,
) -> float:
    ids, weights = data
    parameters = list(model.parameters())
    scale = 1.0 / float(weights[:, 1:].sum())
    parts = [
        (ids[i : i + settings.micro_rows], weights[i : i + settings.micro_rows] * scale)
        for i in range(0, len(ids), settings.micro_rows)
    ]
    results = list(pool.map(lambda part: _gradients(model, parameters, *part), parts))
    # Summed in the order of the micro-batches, whichever thread was first: the same bits every time.
    for position, parameter in enumerate(parameters):
        parameter.grad = sum((gradients[position] for _, gradients in results[1:]), results[0][1][position])
    nn.utils.clip_grad_norm_(parameters, settings.clip)
    for optimizer in optimizing:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return sum(loss for loss, _ in results)


def _gradients(
    model: nn.Module, parameters: list[nn.Parameter], ids: Tensor, weights: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    """Weighted loss of one micro-batch and its gradients; runs on a thread of the pool."""
    with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses.float() * weights[:, 1:].flatten()).sum()
    return float(loss.detach()), torch.autograd.grad(loss, parameters)


def _write_checkpoint(
    path: Path, model: nn.Module, optimizing: list[torch.optim.Optimizer], settings: Settings, progress: Progress
) -> None:
    state = {
        "settings": asdict(settings),
        "progress": asdict(progress),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizing],
    }
    with atomic_output(path, overwrite=True) as file:
        torch.save(state, file)


def _read_checkpoint(
    path: Path, model: nn.Module, optimizing: list[torch.optim.Optimizer], settings: Settings
) -> Progress:
    if not path.exists():
        return Progress()
    state: dict[str, Any] = torch.load(path, weights_only=True)
    progress = Progress(**state["progress"])
    if {**state["settings"], "steps": 0} != {**asdict(settings), "steps": 0}:
        raise StaleStateError(f"{path} was made with other settings ({state['settings']}); name another folder")
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizing, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return progress


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks: giving each activation back to the system costs a fifth of the speed here."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**28)
    mallopt(mmap_threshold, 2**30)
