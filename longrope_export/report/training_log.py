"""A fine-tuning log of JSON lines: the loss of every step, and its plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from longrope_export.errors import InputFileError
from longrope_export.report.json_lines import json_lines
from longrope_export.report.searches import running_mean
from longrope_export.report.style import Layout, Picture, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class TrainingLog:
    """(step, loss) of a fine-tuning, in the file's order; `evaluations` are (step, loss on held-out texts)."""

    name: str
    losses: tuple[tuple[float, float], ...]
    evaluations: tuple[tuple[float, float], ...] = ()


def read_training_log(path: Path, name: str) -> TrainingLog:
    """Steps and losses of a log; lines without both are passed over. Raises `InputFileError` where none has them."""
    losses: dict[float, float] = {}
    held_out: dict[float, float] = {}
    for line in json_lines(path):
        step = line.integer("step")
        for key, found in (("loss", losses), ("eval_loss", held_out)):
            value = line.real(key) if key in line.values else None
            # A run that was continued writes some steps again: the later line holds.
            if step is not None and value is not None:
                found[step] = value
        if len(losses) > MOST_STEPS:
            raise InputFileError(f"it has over {MOST_STEPS:,} steps")
    if not losses:
        raise InputFileError("no line of it has a step and a loss")
    return TrainingLog(name, tuple(sorted(losses.items())), tuple(sorted(held_out.items())))


def training_picture(log: TrainingLog, name: str) -> Picture:
    """The figure of one log."""
    first, last = log.losses[0], log.losses[-1]
    return picture(
        name,
        lambda figure, layout: draw_training(figure, layout, log),
        f"Training loss by step: {first[1]:.3f} at step {first[0]:.0f}, {last[1]:.3f} at step {last[0]:.0f}.",
        "Loss of every step, and the mean over a twentieth of them.",
    )


def draw_training(figure: Figure, layout: Layout, log: TrainingLog) -> None:
    """One panel: single steps faint, their running mean strong, held-out losses as diamonds."""
    figure.set_size_inches(layout.width, layout.width * (0.75 if layout.narrow else 0.4))
    axes = figure.subplots()
    axes.plot(*zip(*log.losses), ".", color="#8fb8d8", markersize=4, label="step", gid="steps")
    width = max(1, len(log.losses) // 20)
    axes.plot(*zip(*running_mean(log.losses, width)), color="#0072B2", label=f"mean of {width} steps", gid="mean")
    if log.evaluations:
        axes.plot(*zip(*log.evaluations), "D", color="#D55E00", label="held-out texts", gid="held-out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.legend(loc="upper right", fontsize="small")
