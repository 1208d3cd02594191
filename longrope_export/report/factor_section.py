"""The part of the page with the factors: the figure, one row a record, and every number in a table that opens."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from longrope_export.report.elements import element, folded, table
from longrope_export.report.factor_plots import critical_dimension, factor_picture, factor_sets, same_rope
from longrope_export.report.figures import Gallery
from longrope_export.report.numbers import tokens_text
from longrope_export.report.sources import Sources
from longrope_export.scaling import RopeScaling

Records = list[tuple[str, RopeScaling]]


def factor_section(sources: Sources, gallery: Gallery) -> list[Element]:
    """One section for all records, in groups that share one RoPE; none without records."""
    records = known_records(sources)
    if not records:
        return []
    parts: list[Element] = []
    while records:
        group = same_rope(records)
        records = [entry for entry in records if entry not in group]
        parts += gallery.figure(factor_picture(group, gallery.name("factors"), gallery.looks))
        parts += [_records_table(group), _numbers_table(group)]
    return [element("section", element("h2", "Factors"), *parts)]


def known_records(sources: Sources) -> Records:
    """The rows' records of all evaluations, then the files' that are not among them; each set of factors once."""
    found: Records = []
    for name, record in [*(entry for each in sources.evaluations for entry in each.records), *sources.records]:
        if all(_plain(record) != _plain(other) for _, other in found):
            found.append((name, record))
    return found


def _records_table(records: Records) -> Element:
    header = ["factors", "L", "L'", "s", "critical pair", "λ long", "λ short", "attention long", "short", "n̂"]
    rows = [
        [
            name,
            f"{record.original_max_position_embeddings:,}",
            f"{record.max_position_embeddings:,}",
            f"{record.factor:g}",
            f"{critical_dimension(record)} of {record.rotary_dim // 2}",
            _range(record.long_factor),
            _range(record.short_factor),
            f"{record.long_attention_factor:.4g}",
            f"{record.short_attention_factor:.4g}",
            f"{record.long_start_tokens}",
        ]
        for name, record in records
    ]
    return table("Records: windows, ranges of λ, attention factors, start tokens", header, rows)


def _numbers_table(records: Records) -> Element:
    sets = factor_sets(records)
    header = ["pair i", *(each.name for each in sets)]
    rows = [[f"{pair}", *(f"{each.factors[pair]:.5g}" for each in sets)] for pair in range(len(sets[0].factors))]
    target = tokens_text(max(record.max_position_embeddings for _, record in records))
    return folded("Every factor as a table", table(f"Divisors λ by pair of dimensions, up to {target}", header, rows))


def _range(factors: Sequence[float]) -> str:
    low, high = min(factors), max(factors)
    return f"{low:.4g}" if low == high else f"{low:.4g}–{high:.4g}"


def _plain(record: RopeScaling) -> dict[str, object]:
    return {**record.to_dict(), "provenance": None}
