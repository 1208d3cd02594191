"""Where the spans of a row begin and end: a window that breaks shows in its last span first."""

from __future__ import annotations


def default_span_edges(longest: int, window: int) -> list[int]:
    """Edges 0…longest in steps of the window doubled or halved until there are 8 to 15 whole steps."""
    step = window if window > 0 else longest
    while step * 8 > longest and step > 1:
        step = step // 2
    while step * 16 <= longest:
        step *= 2
    return [*range(0, longest, step), longest]
