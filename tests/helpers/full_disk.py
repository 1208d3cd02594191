"""A real disk that fills up: a small tmpfs in a namespace of its own, or a limit on file sizes where none is allowed."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_MOUNT = 'mount -t tmpfs -o size="$1" full "$0" && shift && exec "$@"'
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", _MOUNT)
_CHILD = """
import os, pathlib, resource, signal, sys, traceback
disk, limit, code = pathlib.Path(sys.argv[1]), int(sys.argv[2]), 0
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
source = sys.argv[3]
sys.argv = sys.argv[3:]
try:
    exec(compile(source, "script", "exec"), {"disk": disk})
except SystemExit as stopped:
    code = stopped.code
except BaseException:
    traceback.print_exc()
    code = 70
print("left", sorted(str(path.relative_to(disk)) for path in disk.rglob("*")), flush=True)
os._exit(code)
"""

COMMAND = "from longrope_export.cli.main import main\nmain(sys.argv[1:])"


@dataclass(frozen=True)
class Filled:
    """What a child left: its exit code (70: a traceback), the lines on stderr, what it printed, and the files."""

    code: int
    errors: list[str]
    printed: str
    left: list[str]


@functools.cache
def can_mount() -> bool:
    """Whether this system lets a test mount a disk of its own."""
    if shutil.which("unshare") is None:
        return False
    command = [*_NAMESPACE, "/tmp", "64k", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def on_small_disk(disk: Path, size: int, *arguments: object, script: str = COMMAND) -> Filled:
    """Run `script` (by default the `longrope` command with `arguments`) with `size` bytes of room in the folder `disk`."""
    limit = 0 if can_mount() else size
    child = [sys.executable, "-c", _CHILD, str(disk), str(limit), "import sys\n" + script, *map(str, arguments)]
    command = [*_NAMESPACE, str(disk), str(size), *child] if can_mount() else child
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "TMPDIR": "/tmp"})
    printed, _, left = done.stdout.rpartition("left ")
    names = [name.strip("' ") for name in left.strip().strip("[]").split(",") if name.strip()]
    return Filled(done.returncode, done.stderr.splitlines(), printed, names)
