"""The report as one HTML page that loads nothing: figures inline, one style sheet allowed by its hash, no script."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from xml.etree.ElementTree import Element

from longrope_export import __version__
from longrope_export.report.elements import bullets, element, to_html
from longrope_export.report.evaluation_section import evaluation_section
from longrope_export.report.factor_section import factor_section, known_records
from longrope_export.report.figures import Gallery
from longrope_export.report.making_section import making_section
from longrope_export.report.search_section import search_section, training_section
from longrope_export.report.sources import Sources
from longrope_export.report.style import looks
from longrope_export.report.stylesheet import STYLE
from longrope_export.report.summary import facts

# The mark by which a page of ours is known, and may be replaced.
GENERATOR = "longrope-export report"


def report_page(sources: Sources) -> tuple[str, Gallery]:
    """The page's HTML and its figures; raises `ModuleNotFoundError` without matplotlib."""
    gallery = Gallery(_looks(sources))
    sections = _sections(sources, gallery)
    title = f"LongRoPE report: {sources.folder.resolve().name}"
    body = [element("h1", title), _facts(sources), _contents(sections), *sections, *_left_out(sources)]
    head = [
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy()),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="generator", content=f"{GENERATOR} {__version__}"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        _style(),
    ]
    page = element("html", element("head", *head), element("body", element("main", *body)), lang="en")
    return to_html(page), gallery


def _sections(sources: Sources, gallery: Gallery) -> list[Element]:
    several = len(sources.evaluations) > 1
    made = [
        evaluation_section(each, gallery, f"Evaluation: {each.name}" if several else "Evaluation")
        for each in sources.evaluations
    ]
    made += factor_section(sources, gallery)
    made += [search_section(run, gallery, len(sources.searches) > 1) for run in sources.searches]
    made += [training_section(log, gallery) for log in sources.training]
    return [*made, making_section(sources)]


def _looks(sources: Sources) -> dict[str, int]:
    """One look a name for the whole page; the records that were searched or given are the page's own."""
    methods = [method for evaluation in sources.evaluations for method in evaluation.methods]
    records = [name for name, _ in known_records(sources)]
    own = [method.name for method in methods if method.own] or [name for name, _ in sources.records]
    return looks([*(method.name for method in methods), *records], own)


def _facts(sources: Sources) -> Element:
    items = [element("li", element("b", value), element("span", name)) for name, value in facts(sources)]
    return element("ul", *items, class_="facts")


def _contents(sections: Sequence[Element]) -> Element:
    links = []
    for number, section in enumerate(sections, start=1):
        section.set("id", f"part-{number}")
        heading = section.find("h2")
        assert heading is not None
        links.append(element("a", heading.text or "", href=f"#part-{number}"))
    return element("nav", *links, aria_label="Contents")


def _left_out(sources: Sources) -> list[Element]:
    if not sources.left_out:
        return []
    return [element("section", element("h2", "Not shown"), bullets(sources.left_out[:100]))]


def _style() -> Element:
    # Set past `element`, which makes line breaks in texts visible nowhere but here would not.
    made = Element("style")
    made.text = STYLE
    return made


def _policy() -> str:
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
