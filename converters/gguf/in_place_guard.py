"""Opening a file that nobody else has open or mapped, and that has no second name: only that may change in place."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from longrope_export.converters.gguf.in_place_room import refusal
from longrope_export.errors import InputFileError, OutputError

Refuse = Callable[[Path, str], OutputError]
# Files named by a hash of their bytes: Hugging Face's cache (SHA-256 or git's SHA-1), Ollama (sha256-…).
_CONTENT_NAME = re.compile(r"(sha256[-:])?([0-9a-f]{64}|[0-9a-f]{40})")

_LEASE_REASONS = {
    errno.EAGAIN: "another program has it open or mapped; close that",
    errno.EACCES: "it belongs to another user",
}


def check_alone(path: Path) -> None:
    """Raise `OutputError` when other names lead to the file's bytes, or its name promises what they are."""
    if _CONTENT_NAME.fullmatch(path.resolve().name):
        raise refusal(path, "it is a blob of a download cache, named by its content")
    if path.is_symlink():
        raise refusal(path, f"it is a link to {path.resolve()}")
    links = path.stat().st_nlink
    if links > 1:
        raise refusal(path, f"it has {links} hard links, and the others would change too")


@contextlib.contextmanager
def opened_alone(path: Path, refuse: Refuse = refusal) -> Iterator[int]:
    """A read-write descriptor of `path`, which no other process can open until it is closed (Linux leases).

    Do not open `path` a second time meanwhile: that would wait for itself. Raises `refuse(path, reason)` when another
    process has the file open or mapped, or the system cannot tell.
    """
    if sys.platform != "linux":
        raise refuse(path, "only Linux can tell whether another program uses it")
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise refuse(path, f"it cannot be opened for writing ({error.strerror})") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputFileError(f"{path} is not a regular file; name a GGUF file")
        reason = _lease_refused(descriptor)
        if reason:
            raise refuse(path, reason)
        yield descriptor
    finally:
        os.close(descriptor)


def _lease_refused(descriptor: int) -> str:
    """Take the lease; the reason when the system does not give it, else nothing."""
    import fcntl

    try:
        # Another program's open sends a signal here and waits; the default one, SIGIO, would end this process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        return _LEASE_REASONS.get(error.errno or 0, "its file system cannot tell whether another program uses it")
    return ""
