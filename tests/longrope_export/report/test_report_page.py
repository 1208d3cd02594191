"""The page: what it holds, that it loads nothing, that nothing of a stranger becomes markup, and that it is reproducible."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_inputs import COMMAND, METHODS, SEARCH_COMMAND, evaluation

from longrope_export.report.page import report_page
from longrope_export.report.sources import find_sources
from longrope_export.report.write import Report, write_report

HOSTILE = "<script>alert(1)</script>\"'>&$\\frac{_☃|"


class Tree(HTMLParser):
    """Tags with their attributes, texts, and the text of each kind of heading and cell."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)

    def attributes(self, tag: str) -> list[dict[str, str]]:
        return [values for name, values in self.tags if name == tag]


@pytest.fixture(scope="session")
def tree(page: str) -> Tree:
    return Tree(page)


def test_the_page_has_every_part(tree: Tree) -> None:
    assert tree.texts["h2"] == ["Evaluation", "Factors", "Search", "Training: results", "How it was made"]
    assert tree.texts["h3"][:4] == [
        "Perplexity",
        "What is kept at the old length",
        "Passkeys and needles",
        "Other tasks",
    ]
    assert tree.texts["h1"] == ["LongRoPE report: results"]
    links = [values["href"] for values in tree.attributes("a")]
    assert links == [f"#part-{number}" for number in range(1, 6)]
    assert {values["id"] for values in tree.attributes("section")} == {link[1:] for link in links}


def test_every_figure_is_there_in_both_sizes_and_as_a_file(tree: Tree, written: Report) -> None:
    names = [values["id"] for values in tree.attributes("figure")]
    assert names == [
        "perplexity-by-length", "perplexity-by-position", "needle-teacher-forced", "factors", "search", "training",
    ]  # fmt: skip
    assert [path.name for path in written.figures] == [f"{name}.png" for name in names]
    images, sources = tree.attributes("img"), tree.attributes("source")
    assert len(images) == len(sources) == len(names)
    for path, image, source in zip(written.figures, images, sources):
        wide = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        narrow = base64.b64decode(source["srcset"].removeprefix("data:image/png;base64,"))
        assert wide == path.read_bytes()
        assert wide[:8] == narrow[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int.from_bytes(wide[16:20]), int.from_bytes(narrow[16:20])) == (1200, 720)
        assert "max-width" in source["media"]


def test_every_method_is_in_every_table_and_alt_text(tree: Tree) -> None:
    alts = [values["alt"] for values in tree.attributes("img")]
    for name in METHODS:
        assert tree.texts["th"].count(name) >= 3, name
        for alt in alts[:3]:
            assert name in alt
    assert "from 10.00 at 256 to 400.0 at 1k" in alts[0]
    assert "window and switch: 256" in alts[0]
    assert "Critical dimension: pair 4" in alts[3]


def test_the_numbers_stand_in_the_tables(page: str) -> None:
    for text in ("8.00", "7.20–8.80", "+50.0%", "+1.0%", "88%", "3 of 4", "62.5%", "1.2", "256 → 1,024"):
        assert text in page, text


def test_the_page_says_how_it_was_made(tree: Tree, page: str) -> None:
    assert tree.texts["pre"] == [f"{SEARCH_COMMAND}\n{COMMAND}"]
    pairs = dict(zip(tree.texts["dt"], tree.texts["dd"]))
    assert pairs["torch"] == "2.13.0"
    assert "seed" in pairs
    assert "3" in tree.texts["dd"]
    assert "7" in tree.texts["dd"]
    assert "./demo, hf, 3,148,032 parameters" in page
    assert "All files are there." in page


def test_nothing_is_loaded_and_nothing_runs(tree: Tree, page: str) -> None:
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|javascript:", re.sub(r"base64,[^\"]*", "", page))
    assert {name for name, _ in tree.tags} & {"script", "link", "iframe", "object", "embed", "form", "base"} == set()
    for _, values in tree.tags:
        assert not [name for name in values if name.startswith("on") or name == "style"]
        for name in ("src", "srcset"):
            assert values.get(name, "data:").startswith("data:image/png;base64,") or name not in values


def test_the_policy_allows_our_style_sheet_and_inline_images_only(tree: Tree) -> None:
    policy = next(values["content"] for values in tree.attributes("meta") if "http-equiv" in values)
    assert next(values for values in tree.attributes("meta") if "http-equiv" in values)["http-equiv"] == (
        "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256("".join(tree.texts["style"]).encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_every_image_has_words_and_every_table_a_name(tree: Tree) -> None:
    assert all(len(values["alt"]) > 30 for values in tree.attributes("img"))
    assert all(values["aria-label"] for values in tree.attributes("table"))
    assert tree.attributes("html") == [{"lang": "en"}]


def test_it_is_readable_on_a_phone_and_in_the_dark(page: str) -> None:
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page
    assert ".scroll { overflow-x: auto" in page


def test_the_same_results_give_the_same_bytes(results: Path, written: Report, tmp_path: Path) -> None:
    first, again = (write_report(results / "search", tmp_path / name) for name in ("first", "again"))
    assert again.page.read_bytes() == first.page.read_bytes()
    assert [path.read_bytes() for path in again.figures] == [path.read_bytes() for path in first.figures]
    assert len(first.figures) == 2
    # Drawn in another order, and among others, the figures are the same too.
    assert first.figures[1].read_bytes() == written.figures[4].read_bytes()
    assert not {b"Software", b"tIME", b"Creation"} & set(
        re.findall(rb"Software|tIME|Creation", first.figures[0].read_bytes())
    )


def test_a_stranger_s_name_stays_text(tmp_path: Path) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    (folder / "<u>line").mkdir(parents=True)
    values = evaluation({"yarn": HOSTILE, "longrope": "_hidden"}) | {"command": HOSTILE, "notes": [HOSTILE]}
    values["tasks"] = {name: values["tasks"][name] for name in ("perplexity", "needle")}
    for row in values["tasks"]["perplexity"]["rows"].values():
        row["spans"] = []
    for row in values["rows"]:
        row["scaling"] = None
    (folder / "<u>line" / "result.json").write_text(json.dumps(values))
    (folder / "<i>broken.json").write_text("{")
    text, _ = report_page(find_sources(folder))
    tree = Tree(text)
    assert {name for name, _ in tree.tags} & {"script", "img", "u", "i"} == {"img"}
    assert len(tree.attributes("img")) == 2
    assert not [values for values in tree.attributes("img") if "onerror" in values]
    assert HOSTILE in tree.texts["th"]
    assert tree.texts["pre"] == [HOSTILE]
    assert "<i>broken.json" in "".join(tree.texts["li"])
    assert tree.texts["h1"] == ["LongRoPE report: <img src=x onerror=alert(1)>"]


def test_control_characters_become_visible(tmp_path: Path) -> None:
    values = evaluation() | {"command": "longrope\x1b[31m eval\x00"}
    values |= {"tasks": {}, "rows": []}
    (tmp_path / "result.json").write_text(json.dumps(values))
    text, _ = report_page(find_sources(tmp_path))
    assert "longrope\\x1b[31m eval\\x00" in text
    assert "\x1b" not in text
