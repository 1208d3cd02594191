"""A run's checkpoints: written beside and renamed, the older one removed last, each with a manifest and the run's identity."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError, OutputError, StaleStateError
from longrope_export.files import check_manifest, sync_folder, write_manifest, write_text

IDENTITY = "run.json"
_NAME = re.compile(r"checkpoint-(\d{1,9})")
_PARTIAL = "partial"
# What libraries say, in errors of their own, when the system has no room left.
_FULL = ("No space left", "os error 28", "Disk quota exceeded", "os error 122", "file write failed", "unexpected pos")


class Checkpoints:
    """The folder of one run's checkpoints; `identity` is what a resumed run must share with them (JSON-ready).

    `main` is false in the other processes of a run, which write into the same folder but never rename or remove;
    `wait` returns when every process has called it.
    """

    def __init__(
        self, folder: Path, identity: Mapping[str, Any], *, main: bool = True, wait: Callable[[], None] = lambda: None
    ) -> None:
        self.folder, self.identity, self._main, self._wait = folder, dict(identity), main, wait

    def last(self) -> Path | None:
        """The newest finished checkpoint, whose files are as its manifest says; None when there is none.

        Raises `StaleStateError` when it belongs to another run (the first field that differs is named), and
        `InputFileError` when its files are damaged.
        """
        newest = self.newest()
        if newest is None:
            return None
        if self._main:  # reading all of it once is enough
            check_manifest(newest)
        check_identity(read_identity(newest), self.identity, newest)
        return newest

    def newest(self) -> Path | None:
        """The newest finished checkpoint, unchecked."""
        found = self._finished()
        return found[-1] if found else None

    @contextlib.contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """Yield a folder to write `checkpoint-<step>` into; afterwards it is the newest one, and the others are gone.

        Raises `OutputError` when the disk is full; the checkpoint before is then untouched.
        """
        partial, name = self.folder / _PARTIAL, f"checkpoint-{step}"
        try:
            if self._main:
                self.clear()
                (partial / name).mkdir(parents=True)
            self._wait()
            yield partial
            self._wait()
            if self._main:
                self._finish(partial / name)
            self._wait()
        except Exception as error:
            if self._main:
                shutil.rmtree(partial, ignore_errors=True)
            if not is_full(error):
                raise
            raise OutputError(self._full(step)) from error

    def clear(self) -> None:
        """Remove what a process that was killed had begun to write."""
        shutil.rmtree(self.folder / _PARTIAL, ignore_errors=True)

    def _finish(self, written: Path) -> None:
        write_text(written / IDENTITY, json.dumps(self.identity, indent=2) + "\n", overwrite=True)
        write_manifest(written)
        target = self.folder / written.name
        if target.exists():
            target.replace(written.with_name("replaced"))
        written.replace(target)
        sync_folder(self.folder)
        for older in self._finished():
            if older != target:
                shutil.rmtree(older, ignore_errors=True)
        self.clear()

    def _finished(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        matches = [(match, path) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted((int(match[1]), path) for match, path in matches)]

    def _full(self, step: int) -> str:
        before = self.newest()
        kept = "nothing was saved before" if before is None else f"{before.name} is intact"
        return (
            f"the disk is full: the checkpoint of step {step} was not written to {self.folder} ({kept}); "
            "free some room and run the same command again"
        )


def check_identity(saved: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> None:
    """Raise `StaleStateError` naming the first entry, with both values, in which a saved run differs from this one."""
    for name, value in now.items():
        if saved.get(name) != value:
            where, old, new = _difference(name, saved.get(name), value)
            raise StaleStateError(
                f"{place} was made with another {where}: {_short(old)} there, {_short(new)} now; "
                "give the same, or name another --out"
            )


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, says that the disk is full."""
    while error is not None:
        if getattr(error, "errno", None) in (28, 122) or any(text in str(error) for text in _FULL):
            return True
        error = error.__cause__ or error.__context__
    return False


def _difference(name: str, old: Any, new: Any) -> tuple[str, Any, Any]:
    """The innermost entry that differs: `record.long_factor[3]` says more than two records side by side."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        key = next(key for key in [*new, *old] if old.get(key) != new.get(key))
        return _difference(f"{name} {key}".removeprefix("options "), old.get(key), new.get(key))
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        index = next(index for index, pair in enumerate(zip(old, new)) if pair[0] != pair[1])
        return _difference(f"{name}[{index}]", old[index], new[index])
    return name, old, new


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_identity(checkpoint: Path) -> dict[str, Any]:
    """The identity that a checkpoint was saved with; raises `InputFileError` when it cannot be read."""
    try:
        values = json.loads((checkpoint / IDENTITY).read_text("utf-8"))
    except (OSError, ValueError):
        values = None
    if not isinstance(values, dict):
        raise InputFileError(f"{checkpoint / IDENTITY} cannot be read; remove {checkpoint.parent} to begin again")
    return values
