"""Attention of a chunk to a long KV cache without a mask of chunk × cache: past and chunk apart, then merged.

transformers gives SDPA such a mask for every chunk after the first, and the kernel reads it for each head: a third of
the time of a prefill on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longrope_export.placement import compute_devices

NAME = "longrope_prefill"
# torch's CPU kernel, the one that gives the log-sum-exp too; where a version lacks it, the mask stays.
_KERNEL = "_scaled_dot_product_flash_attention_for_cpu"


@contextmanager
def maskless_attention(model: Any) -> Iterator[None]:
    """Inside the `with`, where `model` runs SDPA on a CPU; elsewhere nothing changes."""
    config = model.config.get_text_config()
    devices = {device.type for device in compute_devices(model)}
    if config._attn_implementation != "sdpa" or devices != {"cpu"} or not hasattr(torch.ops.aten, _KERNEL):
        yield
        return
    _register()
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"


@cache
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """No mask for plain causal attention, which `_attention` knows by the lengths; transformers' for everything else."""
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    plain = kwargs.get("mask_function") is causal_mask_function and kwargs.get("attention_mask") is None
    return None if plain else sdpa_mask(*args, **kwargs)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """As transformers' `sdpa_attention_forward`: query [B, H, Q, D], key and value [B, H / groups, K, D] → [B, Q, H, D]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    queries, past = query.shape[2], key.shape[2] - query.shape[2]
    if attention_mask is None and past > 0 and queries > 1:
        if query.shape[-1] == value.shape[-1] and not _unusual(kwargs):
            return _merged(query, key, value, past, kwargs.get("scaling")), None
        attention_mask = torch.ones(queries, key.shape[2], dtype=torch.bool, device=query.device).tril(past)[None, None]
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return found


def _unusual(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "is_causal"))


def _merged(query: Tensor, key: Tensor, value: Tensor, past: int, scaling: float | None) -> Tensor:
    kernel = getattr(torch.ops.aten, _KERNEL)
    shape, groups = query.shape, query.shape[1] // key.shape[1]
    # Nothing is masked in the past, so the heads that share a key can be further queries of one head.
    packed = query.reshape(shape[0], key.shape[1], groups * shape[2], shape[3])
    before, before_sums = kernel(packed, key[:, :, :past], value[:, :, :past], scale=scaling)
    own_key, own_value = (part[:, :, past:].repeat_interleave(groups, dim=1) for part in (key, value))
    inside, inside_sums = kernel(query, own_key, own_value, is_causal=True, scale=scaling)
    share = torch.sigmoid(before_sums.reshape(shape[:3]) - inside_sums)[..., None]
    merged = torch.lerp(inside.float(), before.reshape(shape).float(), share)
    return merged.to(query.dtype).transpose(1, 2).contiguous()
