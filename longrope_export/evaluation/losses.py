"""Per-token losses and logits of a causal language model, without a tensor of length × vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from longrope_export.errors import UnsupportedModelError
from longrope_export.placement import input_device

# Targets below 0 are not scored: their loss is 0 (labels of transformers' trainers hold -100 there).
IGNORED = -100

# Logits become losses in blocks of about this many float32 values, which stay in the processor's cache: at a vocabulary
# of 49,152 that is five times as fast as on whole chunks.
_BLOCK_VALUES = 1 << 18
_LOG2_E = math.log2(math.e)

# What families do to lm_head's output, by the attribute of their config (transformers' modeling_{granite,cohere,
# gemma2,gemma3}.py). `check_head` refuses a model whose own logits differ from this.
LOGIT_RULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logits_scaling": lambda logits, value: logits / value,
    "logit_scale": lambda logits, value: logits * value,
    "final_logit_softcapping": lambda logits, value: torch.tanh(logits / value) * value,
}


def token_losses(model: nn.Module, input_ids: Tensor, *, chunk: int = 512, positions: Tensor | None = None) -> Tensor:
    """Cross entropy in nats of tokens 2…T of one row, float32 [T-1], from one forward pass of the model's body.

    `input_ids` is int64 [1, T]; `positions` [1, T] replaces 0…T-1 as position ids. lm_head runs on `chunk` positions
    at a time, so memory does not grow with length × vocabulary, also under autograd (chunks are recomputed in the
    backward pass).
    """
    hidden = body_states(model, input_ids, positions)[0, :-1]
    return state_losses(model, hidden, input_ids[0, 1:].to(hidden.device), chunk=chunk)


def state_losses(model: nn.Module, states: Tensor, targets: Tensor, *, chunk: int = 512) -> Tensor:
    """Cross entropy in nats of `targets` [n] after hidden states [n, hidden], float32 [n], `chunk` of them at a time.

    It is 0 where the target is `IGNORED`.
    """
    chunks = zip(torch.split(states, chunk), torch.split(targets, chunk))
    return torch.cat([_chunk_losses(model, part, wanted) for part, wanted in chunks])


def state_losses_and_gradients(
    model: nn.Module, states: Tensor, targets: Tensor, weights: Sequence[Tensor] = (), *, chunk: int = 512
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`state_losses`, and the gradients of their sum in `states` and in `weights`, parameters of lm_head.

    Each chunk's backward follows its forward at once, so that nothing is kept and nothing is computed twice: one matrix
    product less than recomputing. Gradients have their tensor's dtype; those of `weights` are summed in float32.
    """
    losses = torch.zeros(len(states), dtype=torch.float32, device=states.device)
    gradient = torch.zeros_like(states)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for start in range(0, len(states), chunk):
        place = slice(start, start + chunk)
        part = states[place].detach().requires_grad_()
        with torch.enable_grad():
            logits = head_logits(model, part)
        upstream = logits.detach()  # overwritten by its own gradient
        losses[place] = _cross_entropy_into_gradient(upstream, targets[place].to(logits.device)).to(losses.device)
        gradient[place], *found = torch.autograd.grad(logits, [part, *weights], upstream)
        for total, value in zip(sums, found):
            total += value
    return losses, gradient, [total.to(weight.dtype) for total, weight in zip(sums, weights)]


def body_states(model: nn.Module, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Last hidden states [1, T, hidden] of the model without its lm_head, no cache and no mask but the causal one."""
    # No attention mask is passed: given one, transformers may materialise [T, T], and SDPA loses its causal kernel.
    return decoder_states(model, input_ids=input_ids, position_ids=positions)


def decoder_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Last hidden states [B, T, hidden] of the model without its lm_head, for any inputs of its forward, no cache."""
    states = body_of(model)(**{**inputs, "use_cache": False}).last_hidden_state
    assert isinstance(states, Tensor)
    return states


def body_of(model: Any) -> Any:
    """The model without its lm_head; raises `UnsupportedModelError` where it has none."""
    body = model.base_model
    if body is model or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{type(model).__name__} has no lm_head; give a causal language model")
    return body


def head_logits(model: nn.Module, states: Tensor) -> Tensor:
    """Logits [n, vocabulary] of hidden states [n, hidden], in the model's dtype, after the family's `LOGIT_RULES`."""
    lm_head: Any = model.get_output_embeddings()  # type: ignore[operator]
    logits: Tensor = lm_head(states)
    for name, rule in LOGIT_RULES.items():
        value = getattr(model.config, name, None)
        if value is not None:
            logits = rule(logits, float(value))
    return logits


# Models whose head is known to be understood: one small forward pass per model is enough.
_checked: WeakSet[nn.Module] = WeakSet()


def check_head(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` when body plus `head_logits` are not the logits that the model itself gives."""
    if model in _checked:
        return
    ids = torch.tensor([[1, 2, 3]], device=input_device(model))
    with torch.no_grad(), _evaluating(model):
        own = model(input_ids=ids, use_cache=False).logits[0].float()
        ours = head_logits(model, body_states(model, ids)[0]).float()
    if own.shape != ours.shape or (own - ours).abs().max() > 0.02 * own.abs().max():
        raise UnsupportedModelError(
            f"{type(model).__name__} changes its logits after lm_head in a way that is not known here; "
            "its perplexity would be wrong"
        )
    _checked.add(model)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """While active, no dropout runs; every module's own mode is back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _chunk_losses(model: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    if torch.is_grad_enabled() and states.requires_grad:
        recomputed: Tensor = checkpoint(_losses, model, states, targets, use_reentrant=False)
        return recomputed
    return _losses(model, states, targets)


def _losses(model: nn.Module, states: Tensor, targets: Tensor) -> Tensor:
    logits = head_logits(model, states)
    targets = targets.to(logits.device)  # a placed model's lm_head may stand elsewhere
    if logits.requires_grad:
        blocks = _blocks(logits, targets)
        return torch.cat([functional.cross_entropy(part.float(), wanted, reduction="none") for part, wanted in blocks])
    # One buffer for all blocks: fresh memory for each costs as much as the exponentials.
    buffer = _block_buffer(logits)
    return torch.cat(
        [_cross_entropy(part, wanted, buffer[: len(part)])[0] for part, wanted in _blocks(logits, targets)]
    )


def _cross_entropy_into_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses float32 [n] of `logits` [n, vocabulary], which become the gradient of the losses' sum."""
    buffer, losses = _block_buffer(logits), []
    for part, wanted in _blocks(logits, targets):
        values = buffer[: len(part)]
        loss, exponentials = _cross_entropy(part, wanted, values)
        scored = (wanted >= 0)[:, None]
        # The subtraction is made before rounding: a likely token's p - 1 would vanish in bfloat16.
        values.mul_(scored / exponentials).scatter_add_(-1, wanted.clamp(min=0)[:, None], -scored.float())
        part.copy_(values)
        losses.append(loss)
    return torch.cat(losses)


def _blocks(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = _block_rows(logits)
    return zip(torch.split(logits, rows), torch.split(targets, rows))


def _block_rows(logits: Tensor) -> int:
    return max(1, _BLOCK_VALUES // logits.shape[-1])


def _block_buffer(logits: Tensor) -> Tensor:
    return torch.empty_like(logits[: _block_rows(logits)], dtype=torch.float32)


def _cross_entropy(logits: Tensor, targets: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """Losses [n], and the sums [n, 1] of the exponentials that `buffer` [n, vocabulary] is left with."""
    # In place and without the log-probabilities of the other tokens: a third of the time of functional.cross_entropy.
    values = buffer.copy_(logits)
    wanted = values.gather(-1, targets.clamp(min=0)[:, None])
    largest = values.amax(-1, keepdim=True)
    # exp2 takes a third of exp's time where torch leaves exp to MKL and the processor is not Intel's.
    sums = values.sub_(largest).mul_(_LOG2_E).exp2_().sum(-1, keepdim=True)
    return (sums.log() + largest - wanted)[:, 0].masked_fill_(targets < 0, 0.0), sums
