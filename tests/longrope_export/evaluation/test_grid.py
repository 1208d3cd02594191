"""Ratios with Wilson intervals: published values, and counts in the right cells."""

from __future__ import annotations

from typing import Any

import pytest

from longrope_export.evaluation.grid import grid, grid_measures, grid_table, ratio_text, wilson


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (0, 0, 0.0, 1.0)],
)
def test_wilson_intervals_are_the_published_ones(right: int, total: int, low: float, high: float) -> None:
    """81 of 263: Newcombe (1998), table I, method 3; the others by the same formula."""
    assert wilson(right, total) == pytest.approx((low, high), abs=6e-5)


def trial(length: int, depth: float, forced: bool, generated: bool | None = None) -> dict[str, Any]:
    return {"length": length, "depth": depth, "forced": forced, "generated": generated}


TRIALS = [
    trial(256, 0.25, True), trial(256, 0.75, False), trial(256, 0.75, True),
    trial(512, 0.25, False, False), trial(512, 0.75, True, True),
]  # fmt: skip


def test_trials_are_counted_by_length_and_depth() -> None:
    found = grid(TRIALS, "forced")
    assert found is not None
    assert (found["lengths"], found["depths"]) == ([256, 512], [0.25, 0.75])
    assert (found["correct"], found["total"]) == ([[1, 1], [0, 1]], [[1, 2], [1, 1]])
    assert found["accuracy"] == {"256": pytest.approx(2 / 3), "512": 0.5}
    assert found["intervals"]["256"] == pytest.approx(wilson(2, 3))


def test_only_trials_that_were_scored_in_a_way_count_there() -> None:
    found = grid(TRIALS, "generated")
    assert found is not None
    assert (found["lengths"], found["correct"], found["total"]) == ([512], [[0, 1]], [[1, 1]])
    assert grid(TRIALS[:3], "generated") is None


def test_measures_have_a_line_a_length_and_a_cell() -> None:
    row = {"lengths": [256, 512], "forced": grid(TRIALS, "forced"), "generated": None}
    lines = list(grid_measures({"rows": {"yarn": row}}))
    assert [(line["length"], line.get("depth"), line["value"], line["count"]) for line in lines] == [
        (256, None, pytest.approx(2 / 3), 3), (256, 0.25, 1.0, 1), (256, 0.75, 0.5, 2),
        (512, None, 0.5, 2), (512, 0.25, 0.0, 1), (512, 0.75, 1.0, 1),
    ]  # fmt: skip
    assert all(line["low"] <= line["value"] <= line["high"] for line in lines)


def test_people_see_the_ratio_its_counts_and_its_interval() -> None:
    assert ratio_text(8, 10) == "80.0% (8/10; 49%–94%)"
    row = {"lengths": [256], "forced": grid(TRIALS[:3], "forced"), "generated": None}
    cells = [list(column.cells) for column in grid_table("T", {"rows": {"yarn [a]": row}}).columns]
    assert [str(cell) for column in cells for cell in column] == ["yarn [a]", "256", ratio_text(2, 3), "–"]
