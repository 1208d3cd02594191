"""The parts of the page about making the factors: a search's progress and scores, and a fine-tuning's loss."""

from __future__ import annotations

from xml.etree.ElementTree import Element

from longrope_export.report.elements import Child, definitions, element, table
from longrope_export.report.figures import Gallery
from longrope_export.report.numbers import MISSING, perplexity_text
from longrope_export.report.search_plots import search_picture
from longrope_export.report.searches import SearchRun
from longrope_export.report.training_log import TrainingLog, training_picture


def search_section(run: SearchRun, gallery: Gallery, several: bool) -> Element:
    """Progress, the scores of everything that has a name, and what the search was asked for."""
    parts: list[Element] = [element("h2", f"Search: {run.name}" if several else "Search")]
    if not run.complete:
        parts.append(element("p", "This search is not complete: the same command continues it."))
    parts += gallery.figure(search_picture(run, gallery.name("search")))
    if run.scores:
        header = ["factors", "search texts", "validation texts", "report texts"]
        rows = [[name, *map(_score, values)] for name, *values in run.scores]
        title = "exp of the loss: search texts lead, validation texts choose, report texts do neither"
        parts.append(table(title, header, rows, [None, _best(run)]))
    parts += [_closed_forms(run)] if run.closed_forms and not run.scores else []
    return element("section", *parts, definitions(run.about))


def training_section(log: TrainingLog, gallery: Gallery) -> Element:
    """A fine-tuning's loss by step."""
    first, last = log.losses[0], log.losses[-1]
    rows = [["first", f"{first[0]:.0f}", f"{first[1]:.4f}"], ["last", f"{last[0]:.0f}", f"{last[1]:.4f}"]]
    figure = gallery.figure(training_picture(log, gallery.name("training")))
    return element(
        "section", element("h2", f"Training: {log.name}"), *figure, table("Loss", ["", "step", "loss"], rows)
    )


def _closed_forms(run: SearchRun) -> Element:
    rows: list[list[Child]] = [[name, f"{loss:.4f}"] for name, loss in run.closed_forms.items()]
    return table("Closed forms on the validation texts, nats a token", ["factors", "loss"], rows)


def _best(run: SearchRun) -> int | None:
    known = [number for number, row in enumerate(run.scores) if row[2] is not None]
    return known[0] if known else None


def _score(value: float | None) -> str:
    return MISSING if value is None else perplexity_text(value)
