"""The figures themselves: marks at the right places, every method a line, and looks that grey does not make equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_inputs import METHODS, PERPLEXITIES, evaluation, journal, record

from longrope_export.report import factor_plots, grid_plots, perplexity_plots, search_plots, style
from longrope_export.report.evaluations import read_evaluation
from longrope_export.report.results import Evaluation, Grid
from longrope_export.report.searches import read_search
from longrope_export.rope.frequencies import wavelengths

LOOK = style.looks(METHODS, ["longrope"])


@pytest.fixture
def figure() -> Iterator[Any]:
    with style.settings(style.WIDE):
        yield style.new_figure(style.WIDE)


@pytest.fixture
def measured() -> Evaluation:
    return read_evaluation(evaluation(), "result")


def lines(figure: Any, gid: str) -> list[list[tuple[float, float]]]:
    """Points of every line with this name, panel by panel."""
    return [
        [(float(x), float(y)) for x, y in zip(*line.get_data())]
        for axes in figure.axes
        for line in axes.lines
        if line.get_gid() == gid
    ]


def draw_positions(figure: Any, measured: Evaluation) -> None:
    curves = perplexity_plots.position_curves(measured, LOOK)
    perplexity_plots.draw_curves(figure, style.WIDE, curves, perplexity_plots.marks(measured), "position")


def test_window_and_switch_stand_where_they_are(figure: Any, measured: Evaluation) -> None:
    draw_positions(figure, measured)
    assert [points[0][0] for points in lines(figure, "window")] == [256.0, 256.0]
    assert not lines(figure, "switch")


def test_a_switch_at_another_length_is_a_mark_of_its_own(figure: Any) -> None:
    values = evaluation() | {"window": 128}
    draw_positions(figure, read_evaluation(values, "result"))
    assert {points[0][0] for points in lines(figure, "window")} == {128.0}
    assert {points[0][0] for points in lines(figure, "switch")} == {256.0}
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["window: 128", "switch: 256"]


def test_static_factors_have_no_switch(measured: Evaluation) -> None:
    assert [mark.text for mark in perplexity_plots.marks(measured)] == ["window and switch: 256"]
    values = evaluation()
    values["rows"] = values["rows"][:3]
    assert [mark.text for mark in perplexity_plots.marks(read_evaluation(values, "result"))] == ["window: 256"]


def test_every_method_is_a_line_through_its_numbers(figure: Any, measured: Evaluation) -> None:
    draw_positions(figure, measured)
    for name in METHODS:
        (points,) = lines(figure, f"curve-{LOOK[name]}")
        assert points == list(zip([128.0, 384.0, 768.0], PERPLEXITIES[name]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(METHODS)
    assert figure.axes[0].get_yscale() == "log"


def test_distances_are_from_the_best_at_each_place(measured: Evaluation) -> None:
    found = perplexity_plots.distances(perplexity_plots.length_curves(measured, LOOK))
    assert [round(each, 6) for _, each in found["unchanged"]] == [0.0, 344.444444, 4900.0]
    assert [round(each, 6) for _, each in found["longrope"]] == [1.0, 0.0, 0.0]


def test_one_method_alone_has_one_panel(figure: Any) -> None:
    values = evaluation()
    values["rows"] = values["rows"][:1]
    draw_positions(figure, read_evaluation(values, "result"))
    assert len(figure.axes) == 1


def test_huge_perplexities_are_drawn() -> None:
    values = evaluation()
    values["tasks"]["perplexity"]["rows"]["unchanged"]["lengths"][2]["perplexity"] = 1e300
    curves = perplexity_plots.length_curves(read_evaluation(values, "result"), LOOK)

    def draw(figure: Any, layout: style.Layout) -> None:
        perplexity_plots.draw_curves(figure, layout, curves, [], "length", by_length=True)
        low, high = figure.axes[0].get_ylim()
        assert low < 8.0 < 400.0 < high < 1e5

    assert style.render(draw, style.NARROW)


def test_looks_differ_in_grey_too() -> None:
    looks = [style.line(index) for index in range(12)]
    assert len({(each.marker, each.dashes) for each in looks}) == 12
    assert LOOK == {"unchanged": 0, "longrope": style.OWN, "pi": 1, "yarn": 2}
    assert len(set(style.looks([f"m{index}" for index in range(30)], ["m3"]).values())) == 31
    many = style.looks(["unchanged", *map(str, range(20))], own=["3"])
    assert [name for name, number in many.items() if style.line(number).colour == "#000000"] == ["unchanged"]


@pytest.mark.parametrize(
    ("text", "shown"), [("_x", " _x"), ("a$\\frac{", "a$\\frac{"), ("雪", "□"), ("n" * 40, "n" * 31 + "…")]
)
def test_labels_hold_what_the_font_has(text: str, shown: str) -> None:
    assert style.label(text) == shown


def test_the_user_s_own_settings_change_nothing() -> None:
    import matplotlib

    def draw(figure: Any, layout: style.Layout) -> None:
        figure.subplots().plot([1, 2])

    before = style.render(draw, style.NARROW)
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0, "savefig.dpi": 33}):
        assert style.render(draw, style.NARROW) == before
        assert matplotlib.rcParams["lines.linewidth"] == 9.0


def test_factors_and_wavelengths_are_drawn_with_their_marks(figure: Any) -> None:
    scaling = record()
    sets = factor_plots.factor_sets([("own", scaling)], {"own": style.OWN})
    factor_plots.draw_factors(figure, style.WIDE, scaling, sets, 1024)
    drawn = lines(figure, f"set-{style.OWN}")
    assert [y for _, y in drawn[0]] == list(scaling.long_factor)
    assert [y for _, y in drawn[1]] == pytest.approx(list(wavelengths(10000.0, 16, scaling.long_factor)))
    # θ^(2i/d) · 2π first reaches 256 tokens at pair ⌈8 · ln(256 / 2π) / ln 10,000⌉.
    critical = math.ceil(8 * math.log(256 / (2 * math.pi)) / math.log(10000.0))
    assert [points[0][0] for points in lines(figure, "critical")] == [critical, critical] == [4.0, 4.0]
    assert [points[0][1] for points in lines(figure, "window")] == [256.0]
    assert [points[0][1] for points in lines(figure, "target")] == [1024.0]
    assert [points[0][1] for points in lines(figure, "scale")] == [4.0]
    assert [axes.get_yscale() for axes in figure.axes] == ["log", "log"]


def test_short_sets_are_drawn_where_they_are_no_repetition() -> None:
    other = record(short_factor=(1.0,) * 7 + (1.1,), sets={512: (1.0,) * 7 + (2.0,)})
    names = [each.name for each in factor_plots.factor_sets([("plain", record()), ("other", other)])]
    assert names == ["plain", "other", "other, short", "other, to 512"]
    assert len({each.look for each in factor_plots.factor_sets([("plain", record()), ("other", other)])}) == 4


def test_records_with_another_rope_get_a_figure_of_their_own() -> None:
    records = [("one", record()), ("two", record(rope_theta=500000.0)), ("three", record())]
    assert [name for name, _ in factor_plots.same_rope(records)] == ["one", "three"]


def test_the_heat_map_has_lengths_across_depths_down_and_the_window(figure: Any, measured: Evaluation) -> None:
    grids = [grid for grid in measured.grids if grid.method in ("unchanged", "yarn")]
    grid_plots.draw_grids(figure, style.WIDE, grids, measured.window)
    image = figure.axes[0].images[0].get_array()
    assert image.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert figure.axes[1].images[0].get_array().tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.75]]
    assert [points[0][0] for points in lines(figure, "window")] == [0.5, 0.5]
    assert figure.axes[0].images[0].get_cmap().name == "cividis"
    assert [text.get_text() for text in figure.axes[1].texts][-1] == "75"


def test_many_depths_are_added_up() -> None:
    depths = tuple((index + 0.5) / 25 for index in range(25))
    grid = Grid("passkey", "m", (64,), depths, (tuple([1] * 20 + [0] * 5),), ((1,) * 25,))
    few = grid_plots.coarse(grid)
    assert len(few.depths) == 10
    assert sum(few.total[0]) == 25
    assert few.overall(0) == grid.overall(0) == 0.8
    assert few.share(0, 0) == 1.0
    assert few.share(0, 9) == 0.0


def test_search_progress_has_closed_forms_steps_and_the_best(figure: Any, tmp_path: Path) -> None:
    run = read_search(journal(tmp_path / "journal.jsonl"), "search", record())
    search_plots.draw_search(figure, style.WIDE, run)
    (steps,) = lines(figure, "steps")
    assert [x for x, _ in steps] == pytest.approx([1.5, 3.0, 4.5, 6.0, 7.5, 9.0])
    assert [y for _, y in lines(figure, "form-yarn")[0]] == pytest.approx([2.4, 2.4])
    assert [y for _, y in lines(figure, "form-pi")[0]] == pytest.approx([2.9, 2.9])
    (chosen,) = lines(figure, "validation")
    assert chosen == [(pytest.approx(9.0), pytest.approx(2.2))]
