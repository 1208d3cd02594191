"""A comparison made in memory becomes a result file that the report and the model card read."""

from __future__ import annotations

import json

import pytest
from report_inputs import LENGTHS, METHODS, PERPLEXITIES, WINDOW, scalings

from longrope_export.evaluation.perplexity import LengthResult, PerplexityResult, SpanResult
from longrope_export.evaluation.tables import ComparisonRow, ComparisonTable
from longrope_export.report.card_figure import card_figure
from longrope_export.report.comparisons import comparison_document
from longrope_export.report.evaluations import read_evaluation
from longrope_export.report.results import Evaluation


def measured(values: list[float]) -> PerplexityResult:
    lengths = tuple(LengthResult(n, value, 1.0, n - 1, (1.0,)) for n, value in zip(LENGTHS, values))
    return PerplexityResult(lengths, (SpanResult(0, 1024, values[-1], 1023),), {}, ("book",), 1, 0.1)


@pytest.fixture
def evaluation() -> Evaluation:
    records = scalings()
    rows = [
        ComparisonRow(name, records[name], measured(PERPLEXITIES[name]), measured([10.5, 1.0, 1.0])) for name in METHODS
    ]
    rows[0] = ComparisonRow("unchanged", None, rows[0].perplexity, rows[0].perplexity)
    table = ComparisonTable(tuple(rows), tuple(LENGTHS), WINDOW, ("book",), "hash", 1.0)
    document = comparison_document(table, "longrope demo", 5, {"torch": "2"}, own="longrope")
    return read_evaluation(json.loads(json.dumps(document, allow_nan=False)), "demo")


def test_all_numbers_arrive(evaluation: Evaluation) -> None:
    assert [method.name for method in evaluation.methods] == list(METHODS)
    assert [method.own for method in evaluation.methods] == [False, False, False, True]
    for method in evaluation.methods:
        assert [point.perplexity for point in method.points] == PERPLEXITIES[method.name]
        assert [span.end for span in method.spans] == [1024]
    short, long = evaluation.methods[3].retention
    assert (short.ratio, long.ratio) == (pytest.approx(1.05), pytest.approx(1.01))
    assert evaluation.command == "longrope demo"
    assert evaluation.switch == evaluation.window == WINDOW


def test_the_card_gets_its_figure(evaluation: Evaluation) -> None:
    picture = card_figure(evaluation)
    assert picture is not None
    assert picture.name == "perplexity"
    assert all(name in picture.alt for name in METHODS)


def test_nothing_measured_is_no_figure() -> None:
    assert card_figure(Evaluation("empty")) is None
