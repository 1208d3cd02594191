"""The figures of one page: their file names, and their place in the page with both sizes inline."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping
from xml.etree.ElementTree import Element

from longrope_export.report.elements import element
from longrope_export.report.style import Picture

# Below this width of the window the narrow drawing is shown.
PHONE = "(max-width: 620px)"


class Gallery:
    """Collects the pictures of a page; every name is given once, and holds nothing but letters, digits and hyphens.

    `looks` numbers the look of every row by its name, the same in all figures (`style.looks`).
    """

    def __init__(self, looks: Mapping[str, int]) -> None:
        self.looks = looks
        self.pictures: list[Picture] = []
        self._given: set[str] = set()

    def name(self, wish: str) -> str:
        """A file name (without .png) like `wish` that no other picture has."""
        base = re.sub(r"[^a-z0-9]+", "-", wish.lower()).strip("-")[:60] or "figure"
        name, number = base, 2
        while name in self._given:
            name, number = f"{base}-{number}", number + 1
        self._given.add(name)
        return name

    def figure(self, picture: Picture | None) -> Iterator[Element]:
        """The picture as an element of the page, or nothing."""
        if picture is None:
            return
        self.pictures.append(picture)
        narrow = element("source", media=PHONE, srcset=_inline(picture.narrow))
        image = element("img", src=_inline(picture.wide), alt=picture.alt)
        yield element(
            "figure", element("picture", narrow, image), element("figcaption", picture.caption), id=picture.name
        )


def _inline(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
