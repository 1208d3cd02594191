"""A tiny model with factors, and a short training of whatever is trainable in it."""

from __future__ import annotations

from typing import Any

import torch
from tiny_families import tiny_family
from torch import Tensor, nn

from longrope_export.loader import apply_scaling
from longrope_export.scaling import RopeScaling
from longrope_export.training.loss import summed_loss
from longrope_export.training.parameters import trained_weights

IDS = torch.randint(0, 97, (1, 12), generator=torch.Generator().manual_seed(3))
RECORD = RopeScaling(
    rope_theta=10000.0, rotary_dim=8, original_max_position_embeddings=8, max_position_embeddings=32,
    long_factor=(1.0, 1.5, 2.0, 4.0), short_factor=(1.0, 1.0, 1.1, 1.2),
)  # fmt: skip


def tiny(**changes: Any) -> Any:
    model = tiny_family("llama", **changes).float()
    apply_scaling(model, RECORD, switch="long")
    return model


def trained_for(model: nn.Module, steps: int = 2) -> dict[str, Tensor]:
    """The weights before `steps` of plain gradient descent on the loss; afterwards all that is trained has moved."""
    weights = trained_weights(model)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with summed_loss(model, chunk=5):
        for _ in range(steps):
            model(input_ids=IDS[:, :-1], labels=IDS[:, 1:]).total.backward()
            with torch.no_grad():
                for weight in weights.values():
                    weight -= 0.02 * weight.grad
                    weight.grad = None
    return before


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found
