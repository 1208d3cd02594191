"""A build that dies at any moment never counts as finished; a full disk is one clear line and leaves nothing."""

from __future__ import annotations

import functools
import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from full_disk import can_mount, on_small_disk

from longrope_export.training.data.building import prepare

Write = Callable[..., Path]

TEXTS = ["hello world", "a", "some more text\nof two lines"]


OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.fsync", "shutil.rmtree")


def dies(step: int, action: Callable[[], object]) -> bool:
    """Whether a child process that ran `action` died by SIGKILL before its file operation number `step`."""
    child = os.fork()
    if child == 0:
        count = 0

        def before(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event in OPERATIONS:
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        real = os.fsync

        def fsync(descriptor: int) -> None:
            sys.audit("os.fsync", descriptor)  # there is no event of its own for it
            real(descriptor)

        os.fsync = fsync
        sys.addaudithook(before)
        try:
            action()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.skipif(os.name == "nt", reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_before_any_file_operation_it_is_not_finished_and_the_next_run_is_right(
    tmp_path: Path, write_jsonl: Write, tiny_tokenizer: Any
) -> None:
    path = write_jsonl(TEXTS)
    expected = prepare([path], tiny_tokenizer, tmp_path / "expected")
    unfinished = 0
    for step in itertools.count(1):
        run = functools.partial(prepare, [path], tiny_tokenizer, tmp_path / str(step))
        if not dies(step, run):
            break
        calls: list[tuple[int, int]] = []
        store = run(report=functools.partial(_note, calls))
        assert store.folder == tmp_path / str(step) / expected.folder.name
        assert store.data_hash == expected.data_hash
        assert [store.read(n).tolist() for n in range(3)] == [expected.read(n).tolist() for n in range(3)]
        unfinished += bool(calls)
    assert unfinished >= 10, "the child died while it wrote"


def _note(calls: list[tuple[int, int]], done: int, everything: int) -> None:
    calls.append((done, everything))


SCRIPT = """
from pathlib import Path
from transformers import ByT5Tokenizer
from longrope_export.errors import LongRopeError
from longrope_export.training.data.building import prepare
try:
    print(len(prepare([Path(sys.argv[1])], ByT5Tokenizer(), disk / "cache")))
except LongRopeError as error:
    print(error, file=sys.stderr)
    raise SystemExit(1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there is no small disk")
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.txt").write_text("0123456789" * 20_000)
    done = on_small_disk(tmp_path / "disk", 200_000, tmp_path / "a.txt", script=SCRIPT)
    assert (done.code, len(done.errors)) == (1, 1), done
    assert "the disk is full" in done.errors[0] or (not can_mount() and "File too large" in done.errors[0])
    assert done.left == ["cache"]
