"""ggml's tensor types: block sizes, taken from the `gguf` package, and the names that people know."""

from __future__ import annotations

from functools import cache


@cache
def _layouts() -> dict[int, tuple[int, int, str]]:
    from gguf.constants import GGML_QUANT_SIZES

    return {int(kind): (block, size, kind.name) for kind, (block, size) in GGML_QUANT_SIZES.items()}


def block_layout(ggml_type: int) -> tuple[int, int] | None:
    """(values per block, bytes per block) of a ggml type, or None when it is not known."""
    layout = _layouts().get(ggml_type)
    return None if layout is None else layout[:2]


def type_name(ggml_type: int) -> str:
    """ggml's name of a tensor type, such as `Q4_K`."""
    layout = _layouts().get(ggml_type)
    return f"type {ggml_type}" if layout is None else layout[2]
