"""Run as a script: changes a file in place in child processes that die by SIGKILL before every system call in turn.

    python killed_in_place.py MODEL RECORD NEXT_RECORD ACTION [--twice STEP]

ACTION is patch, again (of a patched file), or unpatch. Prints one JSON line: the SHA-256 sums before and after the
whole action, and for every step where the child died, what was left and what the next command made of it. With
`--twice STEP` the child that mends the file dies too, before each of its own calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longrope_export.converters.gguf import in_place_room
from longrope_export.converters.gguf.in_place import patch_in_place, unpatch_in_place
from longrope_export.converters.gguf.in_place_recovery import recover
from longrope_export.formats.records import read_scaling

CHANGING = ("open", "close", "pwrite", "fsync", "ftruncate", "unlink")


def die_before(step: int) -> None:
    """End this process by SIGKILL before its call number `step`; a write dies half done on its second turn."""
    count = 0

    def turn(call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if call is pwrite:
            count += 1
            if count == step:
                call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
                os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **named)

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: turn(call, *arguments, **named)

    pwrite = os.pwrite
    for name in CHANGING:
        setattr(os, name, counted(getattr(os, name)))
    in_place_room._call = counted(in_place_room._call)


def in_child(action: Callable[[], object], step: int) -> bool:
    """Whether a child process that ran `action` died before its call number `step`."""
    child = os.fork()
    if child == 0:
        try:
            die_before(step)
            action()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def deaths(path: Path, raw: bytes, action: Callable[[], object]) -> Iterator[int]:
    """Restore the file and let a child die before each call in turn, until one lives."""
    step = 1
    while True:
        path.write_bytes(raw)
        if not in_child(action, step):
            return
        yield step
        step += 1


def mended(path: Path) -> dict[str, Any]:
    """What the death left, what recovery says, and what it leaves."""
    magic = path.read_bytes()[:4].decode("latin-1")
    outcome = recover(path)
    return {"magic": magic, "outcome": outcome, "sha256": sha256(path), "files": names(path.parent)}


def main() -> None:
    os.fsync = lambda descriptor: None  # a step like any other, but SIGKILL loses no cached page, and syncs take time
    path, first, second = Path(sys.argv[1]), read_scaling(sys.argv[2]), read_scaling(sys.argv[3])
    action = sys.argv[4]
    twice = int(sys.argv[6]) if len(sys.argv) > 5 else None
    if action != "patch":
        patch_in_place(path, first)
    run = {
        "patch": lambda: patch_in_place(path, first),
        "again": lambda: patch_in_place(path, second),
        "unpatch": lambda: unpatch_in_place(path),
    }[action]
    raw, before, results = path.read_bytes(), sha256(path), []
    run()
    after = sha256(path)
    for step in deaths(path, raw, run):
        if twice is None:
            results.append({"step": step, **mended(path)})
        elif step % twice == 0:
            torn = {file: (path.parent / file).read_bytes() for file in names(path.parent)}
            results += [{"step": step, **mended(path)} for _ in mending_deaths(path, torn)]
        else:
            recover(path)
    print(json.dumps({"before": before, "after": after, "results": results, "completed": sha256(path)}))


def mending_deaths(path: Path, torn: dict[str, bytes]) -> Iterator[int]:
    """Put the torn files back, inode kept, and let a mending child die before each of its calls in turn."""
    step = 1
    while True:
        for name, raw in torn.items():
            (path.parent / name).write_bytes(raw)
        if not in_child(lambda: recover(path), step):
            return
        yield step
        step += 1


if __name__ == "__main__":
    main()
