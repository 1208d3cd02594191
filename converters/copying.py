"""Copying ranges of bytes between open files in constant memory."""

from __future__ import annotations

import os
from io import BufferedRandom
from typing import BinaryIO

from longrope_export.errors import InputFileError

# Larger blocks fall out of the processor cache and are slower.
BLOCK = 1 << 20
_STEP = 32 << 20


def copy_range(source: BinaryIO, target: BinaryIO, start: int, length: int) -> None:
    """Append `length` bytes of `source` (unbuffered) from offset `start` to `target`.

    Raises `InputFileError` when the source ends early, `OSError` when the target cannot be written.
    """
    # A buffered writer cuts large blocks into odd pieces and copies part of each once more.
    target.flush()
    raw = target.raw if isinstance(target, BufferedRandom) else target
    buffer = memoryview(bytearray(min(BLOCK, max(length, 1))))
    source.seek(start)
    left, sent = length, raw.tell()
    while left:
        count = source.readinto(buffer[: min(len(buffer), left)])  # type: ignore[attr-defined]
        if not count:
            raise InputFileError(f"{source.name} ended {left:,} bytes early: it changed while it was being read")
        _write_all(raw, buffer[:count])
        left -= count
        if raw.tell() - sent >= _STEP:
            sent = _send_to_disk(raw.fileno(), sent, raw.tell())
    target.seek(raw.tell())


def _write_all(raw: object, block: memoryview) -> None:
    while block:
        block = block[raw.write(block) :]  # type: ignore[attr-defined]


def _send_to_disk(descriptor: int, start: int, end: int) -> int:
    """Let the system write these bytes now, while the next ones are copied: the final sync then has little to do."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
    return end
