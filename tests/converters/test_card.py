"""The model card's table and figure: there whenever something was measured, and no name in them is markup."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from longrope_export.converters.card import CardContents, markdown_table, model_card
from longrope_export.pipeline import _write_card
from longrope_export.report.style import Picture
from longrope_export.scaling import RopeScaling

SCALING = RopeScaling(
    rope_theta=10000.0, rotary_dim=4, original_max_position_embeddings=32, max_position_embeddings=64,
    long_factor=(1.0, 2.0),
)  # fmt: skip
FIGURE = Picture("perplexity", "Perplexity of [all] <rows>", "Below, <the> distance.", b"\x89PNG wide", b"narrow")
FACTORS = Picture("factors", "Rescale factors", "", b"\x89PNG factors", b"narrow")
TABLE = [["factors", "1×"], ["unchanged", "10.00"], ["a|b <i>", "9.00"]]


def contents(**changes: object) -> CardContents:
    return CardContents(name="model", scaling=SCALING, command="longrope demo", **changes)  # type: ignore[arg-type]


def test_table_and_figure_stand_together(tmp_path: Path) -> None:
    _write_card(tmp_path, contents(table=TABLE, table_caption="Measured.", figure=FIGURE))
    card = (tmp_path / "README.md").read_text()
    part = card.partition("## Before and after")[2].partition("## Running")[0]
    assert part.index("Measured.") < part.index("| unchanged | 10.00 |") < part.index("![")
    ((alt, target),) = re.findall(r"!\[(.*)\]\((.*)\)", card)
    assert (tmp_path / target).read_bytes() == FIGURE.wide
    assert alt == "Perplexity of \\[all\\] &lt;rows&gt;"
    assert "\n\nBelow, &lt;the&gt; distance.\n" in part


@pytest.mark.parametrize("changes", [{"table": TABLE}, {"figure": FIGURE}])
def test_either_is_shown_alone(changes: dict[str, object]) -> None:
    card = model_card(contents(**changes))
    assert ("| unchanged |" in card) == ("table" in changes)
    assert ("perplexity.png" in card) == ("figure" in changes)


def test_a_card_without_measurements_has_no_such_part() -> None:
    assert "Before and after" not in model_card(contents())


def test_factors_have_a_part_of_their_own(tmp_path: Path) -> None:
    _write_card(tmp_path, contents(factors=FACTORS))
    card = (tmp_path / "README.md").read_text()
    assert "Before and after" not in card
    assert "## The factors\n\n![Rescale factors](factors.png)" in card
    assert (tmp_path / "factors.png").read_bytes() == FACTORS.wide


def test_cells_are_text() -> None:
    table = markdown_table([["factors", "x"], ["a|b <img src=x>\n`c` [d](e) \\", "1"]])
    header, rule, row = table.split("\n")
    assert header == "| factors | x |"
    assert rule == "| --- | ---: |"
    assert row == "| a\\|b &lt;img src=x&gt; \\`c\\` \\[d\\](e) \\\\ | 1 |"
