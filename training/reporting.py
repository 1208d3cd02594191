"""What a run tells while it goes: log.jsonl, a line of state, and Ctrl-C turned into a checkpoint."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from longrope_export.files import output_errors, write_text
from longrope_export.training.processes import any_of_all

LOG = "log.jsonl"
# `progress(step, steps, status)`; `say(line)` for what stays on the terminal.
Progress = Callable[[int, int, str], None]
Say = Callable[[str], None]

_SHOWN = {"loss": "loss {:.4f}", "learning_rate": "rate {:.2e}", "tokens_per_second": "{:,.0f} tokens/s"}


class Stop:
    """Whether the user, or the system, has asked the run to stop."""

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self, say: Say) -> Iterator[None]:
        """While active, the first Ctrl-C (or SIGTERM) is noted, and the second one ends the run at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        line = "stopping after this step, with a checkpoint; again to stop at once, without"
        # Not from the handler: it may have interrupted another line.
        telling = threading.Thread(target=say, args=(line,), daemon=True)

        def note(number: int, frame: Any) -> None:
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True
            telling.start()

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.asked:
                telling.join()


class StopCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Saves and stops after the step in which any process was asked to; `stopped` tells that it did."""

    def __init__(self, stop: Stop) -> None:
        self.stop, self.stopped = stop, False

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if any_of_all(self.stop.asked):
            self.stopped = state.global_step < state.max_steps
            control.should_save = control.should_training_stop = True


class LogCallback(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Writes every logged number to `folder`/log.jsonl, and shows where the run stands."""

    def __init__(self, folder: Path, progress: Progress, say: Say) -> None:
        self.path, self._progress, self._say = folder / LOG, progress, say
        self._status = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if not state.is_world_process_zero:
            return
        # A run that was killed may have gone further than the checkpoint that it continues from.
        write_text(self.path, "".join(_lines_up_to(self.path, state.global_step)), overwrite=True)
        self._progress(state.global_step, state.max_steps, self._status)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **more: Any) -> None:
        # Trainer's own summary at the end counts from the last start, not from the beginning.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        entry = {"step": state.global_step, **logs}
        with output_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        measured = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        if measured:
            shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in measured.items())
            self._say(f"step {state.global_step}: {shown}")
        if shown_now := [text.format(logs[name]) for name, text in _SHOWN.items() if name in logs]:
            self._status = ", ".join([f"step {state.global_step}", *shown_now])
        self._progress(state.global_step, state.max_steps, self._status)


def _lines_up_to(path: Path, step: int) -> list[str]:
    if not path.is_file():
        return []
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if entry.get("step", 0) <= step and step:
            kept.append(line)
    return kept


class Rate:
    """Tokens a second between two readings, without the time that is not spent on steps."""

    def __init__(self) -> None:
        self._since, self._tokens = time.monotonic(), 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def read(self, tokens: int) -> float:
        """Tokens a second since the last reading, when `tokens` are done by now."""
        now = time.monotonic()
        rate = (tokens - self._tokens) / max(now - self._since, 1e-9)
        self._since, self._tokens = now, tokens
        return rate
