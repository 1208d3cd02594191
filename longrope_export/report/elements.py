"""HTML as a tree of elements, so that every text is escaped by the standard library when it is written."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree.ElementTree import Element, tostring

from longrope_export.cli.tables import printable

Child = Element | str


def element(tag: str, *children: Child, **attributes: str) -> Element:
    """An element; texts are data, never markup. `class_` is the attribute class; `data_x` is data-x."""
    made = Element(tag, {_attribute(name): printable(value) for name, value in attributes.items()})
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + _text(child)
        else:
            made.text = (made.text or "") + _text(child)
    return made


def to_html(page: Element) -> str:
    """The tree as HTML."""
    return "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"


def table(
    caption: str, header: Sequence[str], rows: Sequence[Sequence[Child]], best: Sequence[int | None] = ()
) -> Element:
    """A table that scrolls by itself where it is too wide; the first column names the row.

    `best` holds, for each column after the first, the number of the row whose cell stands out.
    """
    head = element("tr", *(element("th", name, scope="col") for name in header))
    body = [element("tr", *_cells(row, number, best)) for number, row in enumerate(rows)]
    made = element("table", element("thead", head), element("tbody", *body), aria_label=caption)
    # The title stands outside what scrolls: on a phone it would be cut off with the table.
    scroll = element("div", made, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return element("div", element("p", caption, class_="title"), scroll)


def definitions(rows: Sequence[tuple[str, str]]) -> Element:
    """A list of names and texts."""
    parts = [element(tag, text) for name, value in rows for tag, text in (("dt", name), ("dd", value))]
    return element("dl", *parts)


def bullets(lines: Sequence[str]) -> Element:
    """A list of lines."""
    return element("ul", *(element("li", line) for line in lines))


def folded(summary: str, *children: Child) -> Element:
    """Children that are shown when the summary is opened."""
    return element("details", element("summary", summary), *children)


def _cells(row: Sequence[Child], number: int, best: Sequence[int | None]) -> list[Element]:
    first, *rest = row
    cells = [element("th", first, scope="row")]
    for column, cell in enumerate(rest):
        stands_out = column < len(best) and best[column] == number
        cells.append(element("td", element("strong", cell) if stands_out else cell))
    return cells


def _attribute(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _text(text: str) -> str:
    return "\n".join(printable(line) for line in text.split("\n"))
