"""Context lengths as people write them: `16384`, `32k`, `1m`, or a multiple of a model's window such as `4x`."""

from __future__ import annotations

import re

from longrope_export.errors import ScalingError
from longrope_export.scaling import MAX_LENGTH

_LENGTH = re.compile(r"(\d{1,18}(?:\.\d{1,18})?)x|(\d{1,18})([km]?)")
_UNITS = {"": 1, "k": 1024, "m": 1024 * 1024}


def is_length(text: str) -> bool:
    """Whether `text` is written as a length, whatever its size."""
    return _LENGTH.fullmatch(text.strip().lower()) is not None


def resolve_length(text: str, window: int) -> int:
    """Tokens meant by `text` for a model with a window of `window` tokens.

    Raises `ScalingError` when it is not written as a length, or is longer than any record can hold.
    """
    match = _LENGTH.fullmatch(text.strip().lower())
    if match is None:
        raise ScalingError(f"{text[:40]!r} is not a length; write 16384, 32k, 1m or 4x")
    length = round(float(match[1]) * window) if match[1] else int(match[2]) * _UNITS[match[3]]
    if length > MAX_LENGTH:
        raise ScalingError(f"{text} is {length:,} tokens; at most {MAX_LENGTH:,} can be written")
    return length
