"""glibc's allocator kept from hoarding: large blocks go back to the system as soon as they are freed."""

from __future__ import annotations

import ctypes
import os
import sys

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
THRESHOLD_BYTES = 1 << 20


def limit_hoarding() -> bool:
    """Tell glibc to give blocks of 1 MiB and more back when they are freed; True where that was done.

    By itself it raises this threshold up to 32 MiB as large blocks come and go, and tensors of changing sizes then leave
    holes that stay resident. Call it before heavy work. Nothing is changed on other C libraries, or where the
    environment (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`, `GLIBC_TUNABLES`) sets the thresholds already.
    """
    if not sys.platform.startswith("linux") or _set_by_user():
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl
        return False
    return all(library.mallopt(name, THRESHOLD_BYTES) for name in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD))


def _set_by_user() -> bool:
    named = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
    return any(name in os.environ for name in named) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
