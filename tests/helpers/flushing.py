"""Whether torch computes denormal floats as zero here, and a look at that where weights are read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch


def flushes() -> bool:
    """In this thread: so few values are not shared among torch's threads."""
    return bool((torch.full((256,), 2e-38) * 0.25 == 0).all())


def noting(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[bool]:
    """One entry for every call of `owner.name` from now on: whether denormals were flushed."""
    original: Callable[..., Any] = getattr(owner, name)
    seen: list[bool] = []

    def look(*arguments: Any, **keywords: Any) -> Any:
        seen.append(flushes())
        return original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, look)
    return seen
