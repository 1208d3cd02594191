"""Copying ranges of bytes between open files in constant memory, as fast as the system allows."""

from __future__ import annotations

from typing import BinaryIO

from longrope_export.errors import InputFileError

# larger blocks fall out of the processor cache and are slower
BLOCK = 1 << 20


def copy_range(source: BinaryIO, target: BinaryIO, start: int, length: int) -> None:
    """Append `length` bytes of `source` from offset `start` to `target`.

    Raises `InputFileError` when the source ends early, `OSError` when the target cannot be written.
    """
    buffer = memoryview(bytearray(min(BLOCK, max(length, 1))))
    source.seek(start)
    left = length
    while left:
        count = source.readinto(buffer[: min(len(buffer), left)])  # type: ignore[attr-defined]
        if not count:
            raise InputFileError(f"{source.name} ended {left:,} bytes early: it changed while it was being read")
        target.write(buffer[:count])
        left -= count
