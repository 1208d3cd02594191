"""How every figure looks: sizes for a wide page and for a phone, colour-blind-safe colours, and bytes that never vary."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from longrope_export.report.results import UNCHANGED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Layout:
    """A size of figures: inches across, dots an inch, points of text; `narrow` ones stack what wide ones put abreast."""

    width: float
    dpi: int
    font: float
    narrow: bool


# 1,200 dots across for a page 1,000 wide, and 720 for a phone's 360.
WIDE = Layout(9.6, 125, 10.5, narrow=False)
NARROW = Layout(4.0, 180, 9.0, narrow=True)

Draw = Callable[["Figure", Layout], None]


@dataclass(frozen=True)
class Picture:
    """One figure, drawn twice as PNG, with what it shows in words for those who do not see it."""

    name: str
    alt: str
    caption: str
    wide: bytes
    narrow: bytes


@dataclass(frozen=True)
class Line:
    """How one row is drawn: a colour, and a marker, dashes and a width that tell it apart in grey too."""

    colour: str
    marker: str
    dashes: str
    width: float


# Okabe & Ito's colours, without the yellow that is lost on white.
_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_DASHES = ("-", "--", "-.", ":")
OWN = 4
WINDOW_COLOUR, SWITCH_COLOUR = "#555555", "#8a4b00"

_SETTINGS = {
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.unicode_minus": True,
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.markersize": 5.0,
    "text.parse_math": False,  # a stranger's name may hold dollar signs
}


def looks(names: Sequence[str], own: Sequence[str] = ()) -> dict[str, int]:
    """Number of each row's look, the same in all figures: black for the unchanged model alone, vermilion for the first of
    `own`, the records that the page is about.
    """
    numbers = {UNCHANGED: 0} | dict.fromkeys(own[:1], OWN)
    free = (index for index in itertools.count(1) if index != OWN and index % len(_COLOURS))
    return numbers | {name: next(free) for name in dict.fromkeys(names) if name not in numbers}


def line(index: int) -> Line:
    """The look of row `index`; no two of the first 252 rows share all three of colour, marker and dashes."""
    return Line(
        _COLOURS[index % len(_COLOURS)],
        _MARKERS[index % len(_MARKERS)],
        _DASHES[index % len(_DASHES)],
        2.6 if index == OWN else 1.6,
    )


def picture(name: str, draw: Draw, alt: str, caption: str) -> Picture:
    """Draw a figure for the page and for the phone; raises `ModuleNotFoundError` without matplotlib."""
    return Picture(name, alt, caption, render(draw, WIDE), render(draw, NARROW))


def render(draw: Draw, layout: Layout) -> bytes:
    """PNG bytes of one figure: the same for the same input, whatever the user's matplotlib settings and the clock."""
    with settings(layout):
        figure = new_figure(layout)
        draw(figure, layout)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=layout.dpi, metadata={"Software": None})
    return buffer.getvalue()


def settings(layout: Layout) -> Any:
    """A context with matplotlib's defaults and ours on top; the user's own come back after it."""
    import matplotlib

    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    return matplotlib.rc_context({**defaults, **_SETTINGS, "font.size": layout.font})


def new_figure(layout: Layout) -> Figure:
    """An empty figure of the layout's width that no window system knows of."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(layout.width, layout.width * 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def label(text: str, most: int = 32) -> str:
    """A stranger's text for a plot: cut to `most` characters, and without those that the font does not have."""
    shown = "".join(char if ord(char) in _characters() else "□" for char in text)
    # matplotlib leaves a legend's lines out that begin with an underscore.
    shown = shown if len(shown) <= most else shown[: most - 1] + "…"
    return f" {shown}" if shown.startswith("_") else shown


@cache
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())


def legend_below(figure: Figure, axes: Axes, layout: Layout) -> None:
    """One legend under the whole figure, in columns."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower center", ncols=1 if layout.narrow else 3, handlelength=3.2)


def mark_vertical(axes: Axes, x: float, text: str, gid: str, colour: str = WINDOW_COLOUR, height: float = 1.0) -> None:
    """A dotted vertical line at `x` with its name beside its top; `height` (0…1) keeps two names apart."""
    axes.axvline(x, color=colour, linestyle=(0, (2, 2)), linewidth=1.3, gid=gid, zorder=1)
    axes.annotate(
        text, (x, height), xycoords=("data", "axes fraction"), xytext=(3, -2), textcoords="offset points",
        va="top", ha="left", color=colour, fontsize="small", gid=f"{gid}-name", zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
    )  # fmt: skip


def mark_horizontal(axes: Axes, y: float, text: str, gid: str, colour: str = WINDOW_COLOUR) -> None:
    """A dotted horizontal line at `y` with its name above its left end."""
    axes.axhline(y, color=colour, linestyle=(0, (2, 2)), linewidth=1.3, gid=gid, zorder=1)
    axes.annotate(
        text, (0.0, y), xycoords=("axes fraction", "data"), xytext=(3, 2), textcoords="offset points",
        va="bottom", ha="left", color=colour, fontsize="small", gid=f"{gid}-name", zorder=4,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6},
    )  # fmt: skip
