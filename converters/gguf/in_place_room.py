"""Making room at the front of a file, and taking it back, without moving a byte of what follows (ext4, XFS)."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

from longrope_export.errors import OutputError

# linux/falloc.h
_COLLAPSE_RANGE, _INSERT_RANGE = 0x08, 0x20
# Blocks of ext4 and XFS, then the larger units of ext4's bigalloc and XFS's real-time volumes.
_UNITS = (4096, 1 << 16, 1 << 18)
_MAX_ALIGNMENT = 1 << 16
_Fallocate = Callable[[int, int, int, int], int]


def refusal(path: Path, reason: str) -> OutputError:
    """The error for a file that cannot be changed where it is; it offers a copy."""
    return OutputError(f"{path} cannot be changed in place: {reason}; write a copy instead, with --out NEW.gguf")


def shift_data(descriptor: int, length: int) -> None:
    """Insert `length` zero bytes at the file's front, or cut off `-length`; a multiple of the file system's unit.

    Raises `OSError` and changes nothing where the file system cannot.
    """
    if length:
        _call(descriptor, _INSERT_RANGE if length > 0 else _COLLAPSE_RANGE, abs(length))


def room_unit(path: Path, alignment: int) -> int:
    """The multiple in bytes by which room can be inserted into the file at `path` and its tensors stay aligned.

    Tried on a nameless file in the same folder. Raises `OutputError` where the system or file system cannot.
    """
    if _fallocate() is None:
        raise refusal(path, "only Linux can insert room into a file (on ext4 and XFS)")
    if alignment > _MAX_ALIGNMENT:
        raise refusal(path, f"its tensors are aligned to {alignment:,} bytes")
    for unit in _UNITS:
        if _works(path, unit):
            return max(unit, alignment)
    raise refusal(path, "its file system cannot insert room into a file (ext4 and XFS can)")


def _works(path: Path, unit: int) -> bool:
    try:
        descriptor = os.open(path.parent, os.O_RDWR | os.O_TMPFILE, 0o600)
        try:
            os.pwrite(descriptor, b"\0", unit)
            shift_data(descriptor, unit)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EISDIR, errno.ENODEV):
            return False
        raise refusal(path, f"its folder cannot be written ({error.strerror})") from error
    return True


def _call(descriptor: int, mode: int, length: int) -> None:
    function = _fallocate()
    if function is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if function(descriptor, mode, 0, length) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def _fallocate() -> _Fallocate | None:
    """The system call that Python's `os.posix_fallocate` does not reach: it takes no mode."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or library.fallocate
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function.restype = ctypes.c_int
    found: _Fallocate = function
    return found
