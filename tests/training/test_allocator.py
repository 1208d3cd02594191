"""glibc's thresholds: a child process that frees blocks between others gives them back, or keeps them."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

GLIBC = platform.libc_ver()[0] == "glibc"
NAMES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

# A freed block of 24 MiB raises glibc's own threshold; then 4 MiB blocks come from the heap, where one small block above
# them keeps all of them resident after they are freed.
SCRIPT = """
import ctypes, sys
from pathlib import Path
from longrope_export.training.allocator import limit_hoarding
done = limit_hoarding() if sys.argv[1] == "limited" else None
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
def block(size):
    place = libc.malloc(size)
    ctypes.memset(place, 1, size)
    return place
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
libc.free(block(24 << 20))
before = resident()
blocks = [block(4 << 20) for _ in range(20)]
top = [block(1000) for _ in range(200)]
for each in blocks:
    libc.free(each)
print(done, (resident() - before) >> 20)
"""


def run(mode: str, **environment: str) -> tuple[str, int]:
    clean = {key: value for key, value in os.environ.items() if key not in NAMES}
    command = [sys.executable, "-c", SCRIPT, mode]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env={**clean, **environment})
    done, kept = result.stdout.split()
    return done, int(kept)


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_freed_blocks_go_back_to_the_system() -> None:
    assert run("limited") == ("True", 0)
    assert run("plain")[1] >= 70, "glibc does not hoard here: the test is empty"


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
@pytest.mark.parametrize("name", NAMES)
def test_what_the_user_has_set_stays(name: str) -> None:
    value = "glibc.malloc.mmap_threshold=33554432" if name == "GLIBC_TUNABLES" else "33554432"
    assert run("limited", **{name: value})[0] == "False"


def test_nothing_happens_on_another_system(monkeypatch: pytest.MonkeyPatch) -> None:
    from longrope_export.training import allocator

    monkeypatch.setattr(sys, "platform", "darwin")
    assert allocator.limit_hoarding() is False
