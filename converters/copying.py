"""Appending to open files in constant memory: ranges of other files, and blocks."""

from __future__ import annotations

import errno
import os
import sys
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

from longrope_export.errors import InputFileError

# Larger blocks fall out of the processor cache and are slower.
BLOCK = 1 << 20
_STEP = 32 << 20
# Between two file systems, or on one that knows no copies of its own.
_NO_SYSTEM_COPY = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ETXTBSY, errno.EBADF)

# linux/fs.h
_FICLONE = 0x40049409
# Of XFS and Btrfs; larger ones only cost the sharing.
SHARED_UNIT = 4096


class Sender:
    """Appends to an open file without its buffer, which cuts large blocks and copies parts of them once more.

    The system is told to write what it has every few megabytes, while the next ones are made: the final sync then has
    little to do. Call `finish` before `file` itself is used again.
    """

    def __init__(self, file: BinaryIO) -> None:
        file.flush()
        self.file = file
        self.raw: Any = file.raw if isinstance(file, BufferedRandom) else file
        self.position = self._sent = self.raw.tell()

    def write(self, block: Any) -> None:
        """Append all of `block`, bytes or an array of them."""
        left = memoryview(block)
        while left:
            count = self.raw.write(left)
            left = left[count:]
            self._advance(count)

    def pad(self, alignment: int) -> None:
        """Append zeros up to a multiple of `alignment`."""
        self.write(bytes(-self.position % alignment))

    def copy(self, source: BinaryIO, start: int, length: int) -> int:
        """Let the system append up to `length` bytes of `source` from `start`; how many, 0 where it does not.

        File systems that can share blocks (XFS, Btrfs) do where both offsets are multiples of theirs: the way there is
        a step of its own.
        """
        if not hasattr(os, "copy_file_range"):
            return 0
        ahead = -start % SHARED_UNIT
        most = ahead if ahead and (start - self.position) % SHARED_UNIT == 0 else _STEP
        try:
            count = os.copy_file_range(source.fileno(), self.raw.fileno(), min(length, most), start)
        except OSError as error:
            if error.errno in _NO_SYSTEM_COPY:
                return 0
            raise
        self._advance(count)
        return count

    def finish(self) -> None:
        """Put `file` itself at the end of what was appended."""
        self.file.seek(self.position)

    def _advance(self, count: int) -> None:
        self.position += count
        if self.position - self._sent >= _STEP:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.raw.fileno(), self._sent, self.position - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = self.position


def can_share(source: Path, folder: Path) -> bool:
    """Whether a new file in `folder` can share the blocks of `source`; tried on a nameless file."""
    if sys.platform != "linux":
        return False
    import fcntl

    try:
        with source.open("rb") as original:
            descriptor = os.open(folder, os.O_RDWR | os.O_TMPFILE, 0o600)
            try:
                fcntl.ioctl(descriptor, _FICLONE, original.fileno())
            finally:
                os.close(descriptor)
    except OSError:
        return False
    return True


def copy_range(source: BinaryIO, target: BinaryIO, start: int, length: int) -> None:
    """Append `length` bytes of `source` (unbuffered) from offset `start` to `target`.

    Raises `InputFileError` when the source ends early, `OSError` when the target cannot be written.
    """
    sender = Sender(target)
    left = length
    while left and (count := sender.copy(source, start + length - left, left)):
        left -= count
    if left:
        _copy_blocks(source, sender, start + length - left, left)
    sender.finish()


def _copy_blocks(source: BinaryIO, sender: Sender, start: int, left: int) -> None:
    buffer = memoryview(bytearray(min(BLOCK, left)))
    source.seek(start)
    while left:
        count = source.readinto(buffer[: min(len(buffer), left)])  # type: ignore[attr-defined]
        if not count:
            raise InputFileError(f"{source.name} ended {left:,} bytes early: it changed while it was being read")
        sender.write(buffer[:count])
        left -= count
