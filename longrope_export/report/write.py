"""Writing the report of a folder: one page and its figures as PNG files, each replaced only when it is complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.errors import OutputError
from longrope_export.files import atomic_output, write_text
from longrope_export.report.page import GENERATOR, report_page
from longrope_export.report.sources import Sources, find_sources

PAGE, FOLDER = "report.html", "report"
_HEAD = 4096


@dataclass(frozen=True)
class Report:
    """What was written, and what it shows."""

    page: Path
    figures: tuple[Path, ...]
    sources: Sources

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        sources = self.sources
        return {
            "page": str(self.page),
            "figures": [str(path) for path in self.figures],
            "records": [name for name, _ in sources.records],
            "evaluations": [each.name for each in sources.evaluations],
            "searches": [each.name for each in sources.searches],
            "training": [each.name for each in sources.training],
            "left_out": sources.left_out,
        }


def write_report(folder: Path, out: Path | None = None) -> Report:
    """Write `out` (default `folder`/report) with report.html and one PNG a figure; an older report is replaced.

    Raises `InputFileError` when there is nothing to report on, `OutputError` when the output cannot be written or a
    report.html of someone else is in the way.
    """
    target = folder / FOLDER if out is None else out
    sources = find_sources(folder, skip=target)
    check_target(target)
    text, gallery = report_page(sources)
    _make(target)
    figures = []
    for picture in gallery.pictures:
        path = target / f"{picture.name}.png"
        with atomic_output(path, overwrite=True) as file:
            file.write(picture.wide)
        figures.append(path)
    write_text(target / PAGE, text, overwrite=True)
    return Report(target / PAGE, tuple(figures), sources)


def check_target(target: Path) -> None:
    """Raise `OutputError` unless `target` can become a report's folder: nothing there, or what is no other page."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; name a folder for the report")
    page = target / PAGE
    if page.exists() and GENERATOR.encode() not in _head(page):
        raise OutputError(f"{page} exists already and is no report of ours; name another --out")


def _head(page: Path) -> bytes:
    with page.open("rb") as file:
        return file.read(_HEAD)


def _make(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{target} was not made: {error.strerror or error}") from error
