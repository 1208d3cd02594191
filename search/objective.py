"""The loss of a candidate on a document, and its gradient in log λ, through a resident frozen model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longrope_export.evaluation.losses import body_states, check_head, head_logits
from longrope_export.rotary import FixedRotary, family_of, replace_rotary
from longrope_export.search.protocol import Outcome, Trial
from longrope_export.search.space import Candidate, RopeNumbers

Documents = Mapping[str, Sequence[npt.NDArray[np.int64]]]

# Positions whose logits exist at once.
CHUNK = 512
# Above this much memory for one layer-by-layer backward pass, layers are recomputed instead of kept.
KEPT_ACTIVATIONS_BYTES = 1 << 30


class ModelObjective:
    """Mean cross entropy of tokens 2…T of each document under a candidate; the model stays as it is otherwise.

    `documents` maps a part's name to rows of token ids. The model is frozen, put into evaluation mode, and its rotary
    embedding is replaced until `close`. Raises `UnsupportedModelError` when its family or its head is not known.
    """

    def __init__(
        self, model: nn.Module, numbers: RopeNumbers, documents: Documents, *, recompute: bool | None = None
    ) -> None:
        family_of(model)
        check_head(model)
        self.model = model.eval().requires_grad_(False)
        self._numbers = numbers
        self._rotary = FixedRotary(numbers.rope_theta, numbers.rotary_dim)
        self._before = replace_rotary(model, self._rotary)
        self._device = next(model.parameters()).device
        self._documents = {
            part: [torch.from_numpy(np.ascontiguousarray(row))[None] for row in rows]
            for part, rows in documents.items()
        }
        longest = max((row.shape[1] for rows in self._documents.values() for row in rows), default=1)
        keep = activation_bytes(model, longest) <= KEPT_ACTIVATIONS_BYTES
        self.recompute = not keep if recompute is None else recompute

    def measure(self, trial: Trial) -> Outcome:
        """The outcome of one trial."""
        row = self._documents[trial.part][trial.document].to(self._device)
        if trial.gradient:
            return self._gradient(trial.candidate, row)
        self._apply(trial.candidate)
        with torch.no_grad():
            hidden = body_states(self.model, row)[0, :-1]
            total = math.fsum(_chunk_losses(self.model, hidden, row[0, 1:]))
        return Outcome(_finite(total / (row.shape[1] - 1)))

    def measure_prefix(self, candidate: Candidate, part: str, length: int, *, gradient: bool) -> None:
        """Run a trial on the first `length` tokens of the part's first document: for measuring time."""
        kept = self._documents[part]
        self._documents[part] = [kept[0][:, :length]]
        try:
            self.measure(Trial(candidate, part, 0, gradient))
        finally:
            self._documents[part] = kept

    def close(self) -> None:
        """Give the model its own rotary embedding back."""
        replace_rotary(self.model, self._before)

    def _apply(self, candidate: Candidate, offsets: Tensor | None = None) -> None:
        factors = torch.tensor(self._numbers.total_factors(candidate), dtype=torch.float64)
        attention: float | Tensor = self._numbers.total_attention_factor(candidate)
        if offsets is not None:
            factors, attention = factors * torch.exp(offsets[:-1]), attention * torch.exp(offsets[-1])
        self._rotary.set_factors(factors, attention, candidate.start_tokens)

    def _gradient(self, candidate: Candidate, row: Tensor) -> Outcome:
        # Offsets in (log λ …, log attention): their gradient at 0 is what the strategies descend on.
        offsets = torch.zeros(self._numbers.pairs + 1, dtype=torch.float64, requires_grad=True)
        self._apply(candidate, offsets)
        with _recomputed_layers(self.model, self.recompute):
            hidden = body_states(self.model, row)[0, :-1]
            loss, wanted = _head_gradient(self.model, hidden.detach(), row[0, 1:])
            torch.autograd.backward(hidden, wanted)
        self._apply(candidate)
        assert offsets.grad is not None
        return Outcome(_finite(loss), tuple(_finite(value) for value in offsets.grad.tolist()))


def _chunk_losses(model: nn.Module, hidden: Tensor, targets: Tensor) -> list[float]:
    """Sums of the losses of `CHUNK` positions each, float32 logits."""
    return [
        float(_summed_loss(model, hidden[start : start + CHUNK], targets[start : start + CHUNK]))
        for start in range(0, len(targets), CHUNK)
    ]


def _summed_loss(model: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head_logits(model, states).float(), targets, reduction="sum")


def _head_gradient(model: nn.Module, hidden: Tensor, targets: Tensor) -> tuple[float, Tensor]:
    """Mean loss of hidden states [T, hidden], and its gradient in them, chunk by chunk.

    Each chunk's backward follows its forward at once, so no logits are kept and none are computed twice.
    """
    gradients, total = torch.empty_like(hidden), []
    for start in range(0, len(targets), CHUNK):
        states = hidden[start : start + CHUNK].requires_grad_()
        wanted = targets[start : start + CHUNK]
        with torch.enable_grad():
            loss = _summed_loss(model, states, wanted)
            (part,) = torch.autograd.grad(loss / len(targets), states)
        gradients[start : start + CHUNK] = part
        total.append(loss.item())
    return math.fsum(total) / len(targets), gradients


def activation_bytes(model: nn.Module, length: int) -> int:
    """Rough memory that one backward pass keeps for `length` tokens without recomputing layers."""
    config: Any = model.config
    hidden, intermediate = int(config.hidden_size), int(getattr(config, "intermediate_size", 0) or 0)
    values = int(config.num_hidden_layers) * length * (16 * hidden + 4 * intermediate)
    return values * next(model.parameters()).element_size()


@contextlib.contextmanager
def _recomputed_layers(model: nn.Module, active: bool) -> Iterator[None]:
    """While active, every layer keeps only its input and is computed again in the backward pass.

    transformers does this in training mode only; the mode is set on the layers alone and not below them, so that no
    dropout runs.
    """
    layers = _checkpointable_layers(model) if active else []
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = False


def _checkpointable_layers(model: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
