"""The figures of a model card: what was measured, or the factors where nothing was; none without matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from longrope_export.report.factor_plots import factor_picture
from longrope_export.report.perplexity_plots import length_picture, position_picture
from longrope_export.report.results import Evaluation
from longrope_export.report.search_plots import search_picture
from longrope_export.report.searches import read_search
from longrope_export.report.style import OWN, Picture, looks
from longrope_export.scaling import RopeScaling

CARD_FIGURE, SEARCH_FIGURE, FACTOR_FIGURE = "perplexity", "search", "factors"


def card_figure(evaluation: Evaluation) -> Picture | None:
    """Perplexity by length (by position, where there is one length only); None when neither was measured."""
    methods = evaluation.methods
    look = looks([method.name for method in methods], [method.name for method in methods if method.own])
    return _drawn(
        lambda: length_picture(evaluation, CARD_FIGURE, look) or position_picture(evaluation, CARD_FIGURE, look)
    )


def search_figure(journal: Path, record: RopeScaling) -> Picture | None:
    """The progress of the search that found `record`, beside the closed forms."""
    return _drawn(lambda: search_picture(read_search(journal, SEARCH_FIGURE, record), SEARCH_FIGURE))


def factor_figure(name: str, record: RopeScaling) -> Picture | None:
    """The record's factors and wavelengths by pair of dimensions."""
    return _drawn(lambda: factor_picture([(name, record)], FACTOR_FIGURE, {name: OWN}))


def _drawn(draw: Callable[[], Picture | None]) -> Picture | None:
    # A card is whole without a figure.
    try:
        return draw()
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
