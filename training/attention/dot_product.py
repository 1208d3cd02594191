"""The one call of PyTorch's attention kernels."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None,
    dropout: float,
) -> Tensor:
    """PyTorch's scaled dot-product attention, [B, H, S, D], where keys and values may have fewer heads."""
    grouped = query.shape[1] != key.shape[1]
    if grouped and not (mask is None and query.device.type in ("cpu", "cuda")):
        repeats = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1), False
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=grouped
    )
