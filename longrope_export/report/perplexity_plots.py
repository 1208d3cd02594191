"""Perplexity by position and by length: one line per method, and how far each is from the best one there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrope_export.report.numbers import perplexity_text, tokens_text
from longrope_export.report.results import Evaluation
from longrope_export.report.style import (
    SWITCH_COLOUR,
    Layout,
    Picture,
    label,
    legend_below,
    line,
    mark_vertical,
    picture,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# More lines than this cannot be told apart; the table has them all.
MOST_LINES = 12
# A method further than this above the best leaves the lower panel, which would else show nothing of the others.
_FAR = 50.0
# A method this many times above the lowest perplexity leaves the upper panel too.
_BROKEN = 2000.0


@dataclass(frozen=True)
class Value:
    """One measured place of a line: its position, the perplexity, and the ends of its interval."""

    x: float
    y: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Curve:
    """A method's line; `look` is the number of its colour, marker and dashes."""

    name: str
    look: int
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Mark:
    """A vertical line: the original window, or the length where the long factors take over."""

    gid: str
    x: int
    text: str


def marks(evaluation: Evaluation) -> list[Mark]:
    """The original window, and the switch where it is another length."""
    window, switch = evaluation.window, evaluation.switch
    if not window:
        return []
    if switch in (None, window):
        name = "window" if switch is None else "window and switch"
        return [Mark("window", window, f"{name}: {tokens_text(window)}")]
    assert switch is not None
    return [
        Mark("window", window, f"window: {tokens_text(window)}"),
        Mark("switch", switch, f"switch: {tokens_text(switch)}"),
    ]


def position_curves(evaluation: Evaluation, look: Mapping[str, int]) -> list[Curve]:
    """Perplexity by the middle of each span, per method that has spans; `look` numbers the looks."""
    return [
        Curve(method.name, look[method.name], values)
        for method in evaluation.methods
        if (values := tuple(Value(s.middle, s.perplexity, s.low, s.high) for s in method.spans if s.perplexity))
    ][:MOST_LINES]


def length_curves(evaluation: Evaluation, look: Mapping[str, int]) -> list[Curve]:
    """Perplexity by length, per method that has any; `look` numbers the looks."""
    return [
        Curve(method.name, look[method.name], values)
        for method in evaluation.methods
        if (values := tuple(Value(p.length, p.perplexity, p.low, p.high) for p in method.points if p.perplexity))
    ][:MOST_LINES]


def position_picture(evaluation: Evaluation, name: str, look: Mapping[str, int]) -> Picture | None:
    """The figure by position, or None without spans."""
    curves = position_curves(evaluation, look)
    if not curves:
        return None
    return picture(
        name,
        lambda figure, layout: draw_curves(figure, layout, curves, marks(evaluation), "position in the text, tokens"),
        _alt("Perplexity by position in the text", curves, marks(evaluation)),
        "Perplexity of the tokens at each position of the longest texts; below, the distance from the best method "
        "there (far ones leave the frame). A window that breaks shows in its last positions long before it shows in "
        "the mean.",
    )


def length_picture(evaluation: Evaluation, name: str, look: Mapping[str, int]) -> Picture | None:
    """The figure by length, or None where fewer than two lengths were measured."""
    curves = length_curves(evaluation, look)
    if len({value.x for curve in curves for value in curve.values}) < 2:
        return None
    return picture(
        name,
        lambda figure, layout: draw_curves(
            figure, layout, curves, marks(evaluation), "length of the text, tokens", by_length=True
        ),
        _alt("Perplexity by length of the text", curves, marks(evaluation)),
        "Perplexity of texts cut to each length; below, the distance from the best method there (far ones leave the frame).",
    )


def draw_curves(
    figure: Figure,
    layout: Layout,
    curves: Sequence[Curve],
    marked: Sequence[Mark],
    x_label: str,
    by_length: bool = False,
) -> None:
    """Lines above, their distance from the best below (when there are two or more), marks in both."""
    panels = 2 if len(curves) > 1 else 1
    height = layout.width * ((1.5 if panels == 2 else 0.9) if layout.narrow else (0.72 if panels == 2 else 0.48))
    figure.set_size_inches(layout.width, height + 0.2 * (len(curves) if layout.narrow else -(-len(curves) // 3)))
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False, height_ratios=[3, 2][:panels])[:, 0]
    for curve in curves:
        _draw_curve(axes[0], curve)
    axes[0].set_ylabel("perplexity")
    _scale_perplexity(axes[0], curves)
    if panels == 2:
        _draw_distances(axes[1], curves)
    _scale_positions(axes[-1], curves, by_length, layout)
    axes[-1].set_xlabel(x_label)
    for panel in axes:
        _draw_marks(panel, marked, named=panel is axes[0])
    legend_below(figure, axes[0], layout)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    look = line(curve.look)
    xs, ys = [value.x for value in curve.values], [value.y for value in curve.values]
    axes.plot(
        xs, ys, color=look.colour, marker=look.marker, linestyle=look.dashes, linewidth=look.width,
        label=label(curve.name), gid=f"curve-{curve.look}",
    )  # fmt: skip
    for value in curve.values:
        if value.low is not None and value.high is not None:
            axes.plot(
                [value.x, value.x], [value.low, value.high], color=look.colour, alpha=0.45, linewidth=2.5, zorder=1
            )


def _scale_perplexity(axes: Axes, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    points = [value for curve in curves for value in curve.values]
    lowest = min(value.y for value in points)
    ends = [end for value in points for end in (value.y, value.low, value.high) if end is not None]
    low, high = max(min(ends), lowest / 10.0), min(max(ends), _BROKEN * lowest)
    if high / low > 3.0:
        # First: matplotlib would look for limits of its own, and overflow where a perplexity is huge.
        axes.set_ylim(low / 1.3, high * 1.4)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0), numticks=12))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.5g}" if value < 1e5 else f"{value:.0e}")
        )
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axes.yaxis.set_major_locator(MaxNLocator(7))


def distances(curves: Sequence[Curve]) -> dict[str, list[tuple[float, float]]]:
    """Per method, (position, per cent above the lowest perplexity of any method there)."""
    best: dict[float, float] = {}
    for curve in curves:
        for value in curve.values:
            best[value.x] = min(value.y, best.get(value.x, value.y))
    return {
        curve.name: [(value.x, 100.0 * (value.y / best[value.x] - 1.0)) for value in curve.values] for curve in curves
    }


def _draw_distances(axes: Axes, curves: Sequence[Curve]) -> None:
    found = distances(curves)
    near = [each for values in found.values() for _, each in values if each <= _FAR]
    top = max(2.0, 1.12 * max(near))
    for curve in curves:
        look, values = line(curve.look), found[curve.name]
        axes.plot(
            [x for x, _ in values], [y for _, y in values], color=look.colour, marker=look.marker, linestyle=look.dashes,
            linewidth=look.width,
        )  # fmt: skip
    axes.set_ylim(-0.06 * top, top)
    axes.set_ylabel("% above the best")


def _scale_positions(axes: Axes, curves: Sequence[Curve], by_length: bool, layout: Layout) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MultipleLocator, NullLocator

    if by_length:
        axes.set_xscale("log", base=2)
        lengths = sorted({value.x for curve in curves for value in curve.values})
        every = -(-len(lengths) // (5 if layout.narrow else 10))
        axes.xaxis.set_major_locator(FixedLocator(lengths[::-1][::every][::-1]))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        end = max(value.x for curve in curves for value in curve.values)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MultipleLocator(_round_step(end / (4 if layout.narrow else 8))))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tokens_text(value)))


def _round_step(least: float) -> int:
    """The power of two from `least` up: positions are read against windows, which are powers of two."""
    return int(2 ** math.ceil(math.log2(max(least, 1.0))))


def _draw_marks(axes: Axes, marked: Sequence[Mark], named: bool) -> None:
    for index, mark in enumerate(marked):
        colour = SWITCH_COLOUR if mark.gid == "switch" else "#555555"
        mark_vertical(axes, mark.x, mark.text if named else "", mark.gid, colour, 1.0 - 0.09 * index)


def _alt(title: str, curves: Sequence[Curve], marked: Sequence[Mark]) -> str:
    ends = "; ".join(
        f"{curve.name} from {perplexity_text(curve.values[0].y)} at {tokens_text(curve.values[0].x)} "
        f"to {perplexity_text(curve.values[-1].y)} at {tokens_text(curve.values[-1].x)}"
        for curve in curves
    )
    return f"{title}. {ends}. Marked: {', '.join(mark.text for mark in marked) or 'nothing'}."
