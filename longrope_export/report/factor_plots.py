"""Factors by pair of dimensions on a log scale, and the wavelengths that they make, against the windows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrope_export.report.numbers import tokens_text
from longrope_export.report.style import (
    OWN,
    SWITCH_COLOUR,
    Layout,
    Picture,
    label,
    legend_below,
    line,
    mark_horizontal,
    mark_vertical,
    picture,
)
from longrope_export.rope.frequencies import critical_index, wavelengths
from longrope_export.scaling import RopeScaling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_SETS = 12


@dataclass(frozen=True)
class FactorSet:
    """One list of divisors λ by name; `look` is the number of its colour, marker and dashes."""

    name: str
    look: int
    factors: tuple[float, ...]


def factor_sets(records: Sequence[tuple[str, RopeScaling]], look: Mapping[str, int] | None = None) -> list[FactorSet]:
    """Long sets, and short sets and those in between where they are not the original frequencies (or the long set).

    `look` numbers the looks of the records' names; other sets get numbers after them.
    """
    found: list[tuple[str, tuple[float, ...]]] = []
    for name, record in records:
        found.append((name, record.long_factor))
        others = [("short", record.short_factor)]
        others += [(f"to {tokens_text(length)}", factors) for length, factors in record.sets.items()]
        found += [
            (f"{name}, {what}", factors)
            for what, factors in others
            if factors != record.long_factor and set(factors) != {1.0}
        ]
    known = dict(look or {})
    for name, _ in found:
        known.setdefault(name, max(known.values(), default=OWN) + 1)
    return [FactorSet(name, known[name], factors) for name, factors in found]


def same_rope(records: Sequence[tuple[str, RopeScaling]]) -> list[tuple[str, RopeScaling]]:
    """Those of the records that share base, rotary dimension and window with the first."""
    return [entry for entry in records if _rope(entry[1]) == _rope(records[0][1])]


def critical_dimension(record: RopeScaling) -> int:
    """First pair that does not turn once within the original window: LongRoPE2's theoretical critical dimension."""
    return critical_index(record.rope_theta, record.rotary_dim, record.original_max_position_embeddings)


def factor_picture(records: Sequence[tuple[str, RopeScaling]], name: str, look: Mapping[str, int]) -> Picture:
    """The figure of all sets of `records`, which share one RoPE (`same_rope`); `look` numbers the looks."""
    record, sets = records[0][1], factor_sets(records, look)
    critical = critical_dimension(record)
    window, target = record.original_max_position_embeddings, longest(records)
    return picture(
        name,
        lambda figure, layout: draw_factors(figure, layout, record, sets, target),
        f"Rescale factors by pair of dimensions, 0 to {record.rotary_dim // 2 - 1}. "
        + "; ".join(f"{s.name} from {s.factors[0]:.3g} to {s.factors[-1]:.3g}" for s in sets[:MOST_SETS])
        + f". Critical dimension: pair {critical}. Wavelengths against {window:,} and {target:,} tokens.",
        "First the divisor λ of each pair's frequency, then the wavelength 2πλθ^(2i/d) that it makes. Pairs from the "
        f"critical dimension on (pair {critical}) never finish a turn within the original {window:,} tokens: beyond "
        "them the model meets angles that it was not trained on, unless λ slows the pair down.",
    )


def longest(records: Sequence[tuple[str, RopeScaling]]) -> int:
    """The longest window L' of the records."""
    return max(record.max_position_embeddings for _, record in records)


def draw_factors(figure: Figure, layout: Layout, record: RopeScaling, sets: Sequence[FactorSet], target: int) -> None:
    """λ and wavelength by pair, abreast or stacked, with λ = 1, λ = s, L, L' and the critical dimension marked."""
    shown = sets[:MOST_SETS]
    rows, columns = (2, 1) if layout.narrow else (1, 2)
    legend = 0.2 * (len(shown) + 1) / (1 if layout.narrow else 3)
    figure.set_size_inches(layout.width, layout.width * (1.5 if layout.narrow else 0.45) + legend)
    factors, waves = figure.subplots(rows, columns, sharex=layout.narrow).flat
    window = record.original_max_position_embeddings
    pairs = range(record.rotary_dim // 2)
    size = 5.0 if len(pairs) <= 40 else 3.0
    original = wavelengths(record.rope_theta, record.rotary_dim)
    waves.plot(pairs, original, color="#777777", linewidth=1.2, label="original", gid="original")
    factors.plot([], [], color="#777777", linewidth=1.2, label="original (λ = 1)")
    for each in shown:
        look = line(each.look)
        waved = wavelengths(record.rope_theta, record.rotary_dim, each.factors)
        for axes, values in ((factors, each.factors), (waves, waved)):
            axes.plot(
                pairs, values, color=look.colour, marker=look.marker, linestyle=look.dashes, linewidth=look.width,
                markersize=size, label=label(each.name), gid=f"set-{each.look}",
            )  # fmt: skip
    _finish_factors(factors, shown, target / window)
    _finish_waves(waves, window, target)
    for axes in (factors, waves):
        critical = critical_dimension(record)
        mark_vertical(axes, critical, f"critical: {critical}" if axes is factors else "", "critical", SWITCH_COLOUR)
        axes.set_xlabel("pair of dimensions i")
    legend_below(figure, factors, layout)


def _finish_factors(axes: Axes, sets: Sequence[FactorSet], scale: float) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("factor λ (log scale)")
    low, high = min(min(each.factors) for each in sets), max(max(each.factors) for each in sets)
    axes.set_ylim(min(low, 1.0) / 1.15, max(high, scale) * 1.3)
    mark_horizontal(axes, scale, f"s = {scale:g}", "scale")
    axes.axhline(1.0, color="#777777", linewidth=1.2, gid="one", zorder=1)


def _finish_waves(axes: Axes, window: int, target: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(10, numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power_text(value)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("wavelength, tokens (log scale)")
    mark_horizontal(axes, window, f"L = {window:,}", "window")
    if target != window:
        mark_horizontal(axes, target, f"L' = {target:,}", "target")


def _power_text(value: float) -> str:
    """Powers of ten: plain up to 10,000, then 10⁵, 10⁶ …"""
    if value < 1e5:
        return f"{value:,.0f}" if value >= 1 else f"{value:g}"
    return "10" + str(round(math.log10(value))).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _rope(record: RopeScaling) -> tuple[float, int, int]:
    return record.rope_theta, record.rotary_dim, record.original_max_position_embeddings
