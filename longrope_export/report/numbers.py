"""Numbers as people read them: the same text in tables, plots, alt texts and model cards."""

from __future__ import annotations

MISSING = "–"


def perplexity_text(value: float | None) -> str:
    """Four significant digits: `21.65`, `436.2`, `1.2e+06`; a dash for None."""
    if value is None:
        return MISSING
    return f"{value:.2f}" if value < 100 else f"{value:.1f}" if value < 10_000 else f"{value:.2g}"


def interval_text(low: float | None, high: float | None) -> str:
    """`12.31–14.02`, or nothing where an end is not known."""
    return "" if low is None or high is None else f"{perplexity_text(low)}–{perplexity_text(high)}"


def tokens_text(length: float) -> str:
    """A number of tokens, short: 256, 2k, 128k, 1M; others with thousands separated."""
    whole = int(length)
    for unit, size in (("M", 1 << 20), ("k", 1 << 10)):
        if whole >= size and whole % size == 0:
            return f"{whole // size}{unit}"
    return f"{whole:,}"


def ratio_text(length: float, window: float | None) -> str:
    """`length` as a multiple of the window: `4×`; nothing without a window."""
    return f"{length / window:.4g}×" if window else ""


def share_text(share: float | None) -> str:
    """A share as per cent without decimals; a dash for None."""
    return MISSING if share is None else f"{share:.0%}"


def change_text(ratio: float | None) -> str:
    """How far a ratio is from 1, in per cent with a sign: `+0.4%`, `−1.2%`; a dash for None."""
    if ratio is None:
        return MISSING
    change = round(100.0 * (ratio - 1.0), 1)
    return f"{'−' if change < 0 else '+' if change > 0 else '±'}{abs(change):.1f}%"
