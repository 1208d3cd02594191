"""The training loss: a sum over shifted labels and its count, without a tensor of length × vocabulary in either pass."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.utils import ModelOutput

from longrope_export.evaluation.losses import (
    IGNORED,
    LOGIT_RULES,
    check_head,
    decoder_states,
    state_losses,
    state_losses_and_gradients,
)
from longrope_export.rotary import core_of

Backend = Literal["chunks", "liger"]
# Logits of a chunk: 64 MiB in float32. Half of it costs a few per cent of time more, twice as much saves none.
CHUNK_VALUES = 1 << 24


class LossSum(NamedTuple):
    """Sum of the cross entropies in nats, float32 [], and the number of labels that it is over, int64 []."""

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple's own `count` is not needed


@dataclass
class SummedLoss(ModelOutput):  # type: ignore[misc]  # transformers is not typed
    """What a model under `summed_loss` gives for labels; divide by the count of all processes and micro-batches."""

    total: Tensor | None = None
    count: Tensor | None = None


def loss_sum(model: nn.Module, states: Tensor, labels: Tensor, *, chunk: int | None = None) -> LossSum:
    """Cross entropy of `labels` [..., T] after hidden states [..., T, hidden], summed; differentiable.

    Labels are shifted already: each is the token that its position predicts, or -100 where none counts. lm_head runs on
    `chunk` positions at a time (None: those whose logits fill `CHUNK_VALUES`). With gradients, each chunk's backward
    follows its forward at once, so that the sum can be differentiated once only.
    """
    flat, wanted = states.flatten(0, -2), labels.flatten().to(states.device)
    count = (wanted != IGNORED).sum()
    if loss_backend(model, flat.device.type) == "liger":
        return LossSum(_liger_sum(model, flat, wanted), count)
    chunk = chunk or chunk_rows(model)
    weights = [weight for weight in _head(model).parameters() if weight.requires_grad]
    if torch.is_grad_enabled() and (flat.requires_grad or weights) and not (weights and _is_sharded(model)):
        total: Tensor = _ChunkedSum.apply(flat, wanted, model, chunk, *weights)  # type: ignore[no-untyped-call]
        return LossSum(total, count)
    return LossSum(state_losses(model, flat, wanted, chunk=chunk).sum(), count)


def _is_sharded(model: nn.Module) -> bool:
    # A gradient that is made in FSDP2's forward for a head that it shards ends the process in its backward pass
    # (torch 2.13, segmentation fault): there chunks are recomputed.
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def chunk_rows(model: Any) -> int:
    """How many positions' logits fill `CHUNK_VALUES`: at least 64, below which a matrix product is slow."""
    return max(64, CHUNK_VALUES // int(_head(model).weight.shape[0]))


class _ChunkedSum(torch.autograd.Function):
    """The sum of the losses; its gradients are made in the forward pass and scaled in the backward pass."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, labels: Tensor, model: nn.Module, chunk: int, *weights: Tensor) -> Tensor:
        losses, gradient, found = state_losses_and_gradients(model, states, labels, weights, chunk=chunk)
        ctx.gradients = [gradient, *found]
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In place, because lm_head's may be the largest tensor of all; so a second backward has nothing to start from.
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            raise RuntimeError("the chunked loss keeps its gradients for one backward pass only")
        states, *weights = (gradient.mul_(upstream.to(gradient.device)) for gradient in found)
        return states, None, None, None, *weights


@contextmanager
def summed_loss(model: nn.Module, *, chunk: int | None = None) -> Iterator[None]:
    """While active, `model(..., labels=shifted labels)` gives a `SummedLoss` instead of logits.

    It is the model's own forward that changes, so that wrappers (DDP, FSDP, PEFT) see an ordinary call. Raises
    `UnsupportedModelError` when the model's head is not understood.
    """
    core: Any = core_of(model)
    check_head(core)
    own = core.__dict__.get("forward")
    plain = core.forward

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **options: Any) -> Any:
        if labels is None:
            return plain(*args, **options)
        states = decoder_states(self, **options)
        return SummedLoss(*loss_sum(self, states, labels, chunk=chunk))

    core.forward = MethodType(forward, core)
    try:
        yield
    finally:
        core.__dict__.pop("forward", None)
        if own is not None:
            core.forward = own


def loss_backend(model: nn.Module, device: str, *, has_liger: bool | None = None) -> Backend:
    """Which implementation computes the loss: Liger's fused kernel on CUDA where it can express the head, else ours."""
    if device != "cuda" or not _liger_expresses(model):
        return "chunks"
    found = importlib.util.find_spec("liger_kernel") is not None if has_liger is None else has_liger
    return "liger" if found else "chunks"


def _liger_expresses(model: Any) -> bool:
    # A head inside a LoRA or another wrapper is no plain matrix; of the families' rules Liger knows the soft cap.
    rules = [name for name in LOGIT_RULES if getattr(model.config, name, None) is not None]
    return type(_head(model)) is nn.Linear and set(rules) <= {_CAP}


_CAP = "final_logit_softcapping"


def _liger_sum(model: Any, states: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    head = _head(model)
    total: Tensor = liger_fused_linear_cross_entropy(
        states,
        head.weight,
        labels,
        bias=head.bias,
        ignore_index=IGNORED,
        reduction="sum",
        softcap=getattr(model.config, _CAP, None),
    )
    return total


def _head(model: Any) -> Any:
    return model.get_output_embeddings()
