"""The one figure of a model card: perplexity by length of everything that was compared."""

from __future__ import annotations

from longrope_export.report.perplexity_plots import length_picture, position_picture
from longrope_export.report.results import Evaluation
from longrope_export.report.style import Picture, looks

CARD_FIGURE = "perplexity"


def card_figure(evaluation: Evaluation) -> Picture | None:
    """Perplexity by length (by position, where there is one length only).

    None when neither was measured, and without matplotlib: a card is whole without a figure.
    """
    methods = evaluation.methods
    look = looks([method.name for method in methods], [method.name for method in methods if method.own])
    try:
        by_length = length_picture(evaluation, CARD_FIGURE, look)
        return by_length or position_picture(evaluation, CARD_FIGURE, look)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        return None
