"""Lengths as people write them."""

from __future__ import annotations

import re

from longrope_export.errors import LongRopeError


def resolve_target(text: str, window: int) -> int:
    """Tokens meant by `16384`, `32k`, `1m` or `4x`; raises `LongRopeError` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x|(\d+)([km]?)", text.strip().lower())
    if not match:
        raise LongRopeError(f"{text!r} is not a length; write 16384, 32k, 1m or 4x")
    if match[1]:
        return round(float(match[1]) * window)
    return int(match[2]) * {"": 1, "k": 1024, "m": 1024 * 1024}[match[3]]
