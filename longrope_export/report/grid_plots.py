"""Heat maps of what was found: passkeys and needles by length of the text and by depth in it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longrope_export.report.numbers import share_text, tokens_text
from longrope_export.report.results import Grid
from longrope_export.report.style import Layout, Picture, label, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 12
# With more cells than this a number no longer fits into one.
_MOST_NUMBERED_COLUMNS, _MOST_DEPTHS = 9, 10


def grid_picture(task: str, grids: Sequence[Grid], window: int | None, name: str) -> Picture:
    """One figure for a task: a heat map per method, all on one scale."""
    shown = [coarse(grid) for grid in grids[:MOST_PANELS]]
    found = "; ".join(f"{grid.method}: {_by_length(grid)}" for grid in grids[:MOST_PANELS])
    return picture(
        name,
        lambda figure, layout: draw_grids(figure, layout, shown, window),
        f"Share found in {task} by length and depth. {found}.",
        f"Share found by length of the text and depth of the hidden text (0%: at the beginning), {task}. "
        "The line stands at the original window; the numbers are per cent.",
    )


def coarse(grid: Grid) -> Grid:
    """The same with at most ten depths: neighbours are added up."""
    count = len(grid.depths)
    if count <= _MOST_DEPTHS:
        return grid
    edges = [round(index * count / _MOST_DEPTHS) for index in range(_MOST_DEPTHS + 1)]
    parts = [slice(start, end) for start, end in itertools.pairwise(edges)]
    depths = tuple(sum(grid.depths[part]) / len(grid.depths[part]) for part in parts)

    def summed(rows: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(sum(row[part]) for part in parts) for row in rows)

    return Grid(grid.task, grid.method, grid.lengths, depths, summed(grid.correct), summed(grid.total))


def draw_grids(figure: Figure, layout: Layout, grids: Sequence[Grid], window: int | None) -> None:
    """Small multiples: columns are lengths, rows are depths, one panel per method."""
    columns = 1 if layout.narrow else min(3, len(grids))
    rows = -(-len(grids) // columns)
    depths = max(len(grid.depths) for grid in grids)
    height = 0.75 + 0.2 * max(depths, 4)
    figure.set_size_inches(layout.width, rows * height + 0.3)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, grid in zip(panels, grids):
        image = _draw_grid(axes, grid, window)
    for axes in panels[len(grids) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=panels, fraction=0.03, pad=0.02, ticks=[0.0, 0.5, 1.0])
    bar.ax.set_yticklabels(["0%", "50%", "100%"])


def _draw_grid(axes: Axes, grid: Grid, window: int | None) -> Any:
    import numpy as np

    shares = [[grid.share(row, column) for row in range(len(grid.lengths))] for column in range(len(grid.depths))]
    values = np.array([[np.nan if share is None else share for share in row] for row in shares])
    image = axes.imshow(values, cmap="cividis", vmin=0.0, vmax=1.0, aspect="auto", origin="upper")
    axes.set_facecolor("#e8e8e8")
    axes.grid(False)
    axes.set_title(label(grid.method, 30), fontsize="medium")
    _ticks(axes, grid)
    if len(grid.lengths) <= _MOST_NUMBERED_COLUMNS:
        for column, row in enumerate(shares):
            for place, share in enumerate(row):
                if share is not None:
                    colour = "black" if share > 0.55 else "white"
                    axes.text(place, column, f"{share:.0%}"[:-1], ha="center", va="center", color=colour, fontsize=7.5)
    edge = window_edge(grid, window)
    if edge is not None:
        axes.axvline(edge, color="white", linewidth=4, gid="window-halo")
        axes.axvline(edge, color="#D55E00", linewidth=1.8, gid="window")
    return image


def window_edge(grid: Grid, window: int | None) -> float | None:
    """Where the original window ends among the columns: behind the last length within it; None where all are alike."""
    if window is None:
        return None
    inside = sum(length <= window for length in grid.lengths)
    return inside - 0.5 if 0 < inside < len(grid.lengths) else None


def _ticks(axes: Axes, grid: Grid) -> None:
    every = -(-len(grid.lengths) // _MOST_NUMBERED_COLUMNS)
    places = range(0, len(grid.lengths), every)
    axes.set_xticks(list(places), [tokens_text(grid.lengths[place]) for place in places])
    deep = range(0, len(grid.depths), 2 if len(grid.depths) > 5 else 1)
    axes.set_yticks(list(deep), [f"{grid.depths[place]:.0%}" for place in deep])
    axes.set_xlabel("length, tokens", fontsize="small")
    axes.set_ylabel("depth", fontsize="small")
    axes.tick_params(length=0, labelsize="small")


def _by_length(grid: Grid) -> str:
    shares = [f"{share_text(grid.overall(row))} at {tokens_text(length)}" for row, length in enumerate(grid.lengths)]
    return ", ".join(shares[:12])
