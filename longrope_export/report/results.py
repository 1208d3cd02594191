"""What the report shows of measurements: methods with perplexities by length and by span, retention, and grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from longrope_export.scaling import RopeScaling

UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Point:
    """Perplexity of texts cut to `length` tokens, with the ends of its confidence interval where there is one.

    `sure` is "↓" or "↑" where it is surely below or above the first row's, paired by document.
    """

    length: int
    perplexity: float | None
    low: float | None = None
    high: float | None = None
    sure: str = ""


@dataclass(frozen=True)
class Span:
    """Perplexity of the tokens at positions [start, end) of the longest texts, and its confidence interval."""

    start: int
    end: int
    perplexity: float | None
    low: float | None = None
    high: float | None = None

    @property
    def middle(self) -> float:
        """Position between the two ends."""
        return 0.5 * (self.start + self.end)


@dataclass(frozen=True)
class Retention:
    """Perplexity at the window with the `factors` ("short", "long") set, and its ratio to the unmodified model's."""

    factors: str
    perplexity: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Method:
    """One row: a set of factors by name, with everything that was measured of it; `own` ones came from a record."""

    name: str
    points: tuple[Point, ...] = ()
    spans: tuple[Span, ...] = ()
    retention: tuple[Retention, ...] = ()
    own: bool = False

    def at(self, length: int) -> Point | None:
        """The point at `length`, or None."""
        return next((point for point in self.points if point.length == length), None)


@dataclass(frozen=True)
class Grid:
    """How often a hidden text was found, by length and depth: `correct[i][j]` of `total[i][j]` at `depths[j]` (0…1)."""

    task: str
    method: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    correct: tuple[tuple[int, ...], ...]
    total: tuple[tuple[int, ...], ...]

    def share(self, row: int, column: int) -> float | None:
        """Share found at one place of the grid; None where nothing was tried."""
        tried = self.total[row][column]
        return self.correct[row][column] / tried if tried else None

    def overall(self, row: int) -> float | None:
        """Share found at one length, over all depths."""
        tried = sum(self.total[row])
        return sum(self.correct[row]) / tried if tried else None


@dataclass(frozen=True)
class Score:
    """One score in a table of tasks, as a text: of a method, at a length where there is one."""

    task: str
    method: str
    length: int | None
    value: str


@dataclass(frozen=True)
class Evaluation:
    """One evaluation as a page shows it. `window` is L, `switch` the length where the long factors take over.

    `about` holds what is needed to measure it again, as names and texts, `versions` the packages' versions.
    """

    name: str
    window: int | None = None
    switch: int | None = None
    methods: tuple[Method, ...] = ()
    grids: tuple[Grid, ...] = ()
    scores: tuple[Score, ...] = ()
    records: tuple[tuple[str, RopeScaling], ...] = ()
    command: str | None = None
    about: Sequence[tuple[str, str]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every length that perplexity was measured at, shortest first."""
        return tuple(sorted({point.length for method in self.methods for point in method.points}))
