"""Longer context for RoPE language models, carried exactly into every runtime.

`RopeScaling` is the record that everything passes around; `load` gives a transformers model that applies it exactly.
Importing this package does not import torch or transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longrope_export.scaling import RopeScaling

if TYPE_CHECKING:
    from longrope_export.loader import load

__all__ = ["RopeScaling", "__version__", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from longrope_export.loader import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
