"""How much memory a search needs: the weights, and what one pass keeps, from the model's shape."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from longrope_export.placement import is_offloaded, weight_places

# Positions whose logits exist at once.
CHUNK = 512


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: weights by device (or "disk"), and on top of them what one evaluation and one gradient need (estimates)."""

    weights: dict[str, int]
    evaluation: int
    gradient: int
    recomputed_layers: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def memory_plan(model: nn.Module, length: int, *, recompute: bool) -> MemoryPlan:
    """The plan for passes of `length` tokens, with layers recomputed in the backward pass or kept."""
    one_layer = activation_bytes(model, length) // _layers(model)
    states = _state_bytes(model, length)
    # A recomputed layer keeps its input and its attention's output.
    kept = (2 * _layers(model) * states + 2 * one_layer) if recompute else activation_bytes(model, length)
    logits = CHUNK * int(_config(model).vocab_size) * (next(model.parameters()).element_size() + 4)
    # The last states, their gradient, and the logits of a chunk with their gradient.
    brought = _largest_layer(model) if is_offloaded(model) else 0
    evaluation, gradient = one_layer + states + logits, kept + 2 * states + 2 * logits
    return MemoryPlan(weight_places(model), evaluation + brought, gradient + brought, recompute)


def activation_bytes(model: nn.Module, length: int) -> int:
    """Rough memory that one backward pass keeps for `length` tokens without recomputing layers."""
    config = _config(model)
    hidden, intermediate = int(config.hidden_size), int(getattr(config, "intermediate_size", 0) or 0)
    values = _layers(model) * length * (16 * hidden + 4 * intermediate)
    return values * next(model.parameters()).element_size()


def _state_bytes(model: nn.Module, length: int) -> int:
    return length * int(_config(model).hidden_size) * next(model.parameters()).element_size()


def _layers(model: nn.Module) -> int:
    return int(_config(model).num_hidden_layers)


def _config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _largest_layer(model: nn.Module) -> int:
    """Bytes of the largest part whose weights are needed at once: a layer in its backward pass, or lm_head."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    parts: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    parts.append(model.get_output_embeddings())  # type: ignore[operator]
    return max(sum(weight.numel() * weight.element_size() for weight in part.parameters()) for part in parts)
