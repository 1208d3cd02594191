"""Search progress: losses by evaluations spent, the best so far, and the closed forms as lines."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from longrope_export.report.searches import Losses, SearchRun, best_so_far, running_mean
from longrope_export.report.style import Layout, Picture, label, line, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINT, _BEST = "#8fb8d8", "#D55E00"
# Looks of the closed forms: none has the colour of what was searched.
_FORMS = (1, 3, 5, 0, 6, 2)
# The first candidates of a population can be far off; the axis ends a little above the middle one.
_SHOWN_SHARE = 0.9


def search_picture(run: SearchRun, name: str) -> Picture | None:
    """The figure of one search, or None when nothing was measured yet."""
    if not run.steps and not run.validation and not run.closed_forms:
        return None
    unit = "candidates" if run.population else "steps"
    best = min((loss for _, loss in run.validation), default=None)
    found = "" if best is None else f" Best searched loss on validation texts: {best:.4f}."
    forms = "; ".join(f"{form} {loss:.4f}" for form, loss in run.closed_forms.items())
    return picture(
        name,
        lambda figure, layout: draw_search(figure, layout, run),
        f"Search progress of {run.strategy}: {len(run.steps):,} {unit}.{found} Closed forms: {forms or 'none'}.",
        "Loss in nats a token by evaluations spent (one candidate on all search texts; a gradient counts three). "
        + (
            "Search texts: every candidate, and the best so far. "
            if run.population
            else "Search texts: every step on its own text, and the mean of neighbouring steps. "
        )
        + "Validation texts, which only choose: what was searched, and the closed forms as lines (their losses in "
        "brackets; one that is far off lies above the frame).",
    )


def draw_search(figure: Figure, layout: Layout, run: SearchRun) -> None:
    """The search texts and the validation texts, abreast or stacked."""
    both = bool(run.steps) and bool(run.validation or run.closed_forms)
    rows, columns = (2, 1) if layout.narrow and both else (1, 2 if both else 1)
    figure.set_size_inches(layout.width, layout.width * (1.55 if rows == 2 else 0.46))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    if run.steps:
        _draw_steps(panels[0], run)
    if run.validation or run.closed_forms:
        _draw_validation(panels[-1], run)
    for axes in panels:
        axes.set_xlabel("evaluations spent")
        axes.set_ylabel("loss, nats a token")
        axes.set_xlim(left=0)


def _draw_steps(axes: Axes, run: SearchRun) -> None:
    axes.set_title("search texts", fontsize="medium", loc="left")
    xs, ys = zip(*run.steps)
    name = "candidates" if run.population else "steps, one text each"
    axes.plot(xs, ys, ".", color=_POINT, markersize=4, label=name, gid="steps", rasterized=True)
    width = max(1, min(run.documents, len(run.steps) // 3))
    drawn = best_so_far(run.steps) if run.population else running_mean(run.steps, width)
    _stairs(axes, drawn, "best so far" if run.population else f"mean of {width} steps", run.population)
    axes.set_ylim(*_limits(ys))
    axes.legend(loc="upper right", fontsize="small", framealpha=0.85, frameon=True)


def _draw_validation(axes: Axes, run: SearchRun) -> None:
    axes.set_title("validation texts", fontsize="medium", loc="left")
    end = max([x for x, _ in (*run.steps, *run.validation)], default=1.0)
    for index, (form, loss) in enumerate(sorted(run.closed_forms.items(), key=lambda item: -item[1])):
        look = line(_FORMS[index % len(_FORMS)])
        dashes = look.dashes if look.dashes != "-" else (0, (6, 1, 1, 1))
        name = f"{label(form)} ({loss:.3f})"
        axes.plot([0.0, end], [loss, loss], color=look.colour, linestyle=dashes, label=name, gid=f"form-{form}")
    if run.validation:
        xs, ys = zip(*run.validation)
        axes.plot(xs, ys, "o", color=_BEST, markersize=5, label="searched", gid="validation")
        _stairs(axes, best_so_far(run.validation), "best searched", stepped=True)
    losses = [loss for _, loss in run.validation] + list(run.closed_forms.values())
    axes.set_ylim(*_limits(losses))
    axes.legend(loc="upper right", fontsize="small", framealpha=0.85, frameon=True)


def _stairs(axes: Axes, losses: Losses, name: str, stepped: bool) -> None:
    if losses:
        xs, ys = zip(*losses)
        axes.plot(xs, ys, color=_BEST, drawstyle="steps-post" if stepped else "default", label=name, gid="best")


def _limits(losses: object) -> tuple[float, float]:
    values = sorted(losses)  # type: ignore[call-overload]
    low, middle = values[0], statistics.median(values)
    high = values[min(len(values) - 1, int(_SHOWN_SHARE * len(values)))]
    high = min(high, middle + 4.0 * max(middle - low, 0.02))
    return low - 0.08 * max(high - low, 0.02), high + 0.25 * max(high - low, 0.02)
