"""One folder of results, and the page made of it, for all tests of the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from report_inputs import write_results

if TYPE_CHECKING:
    from longrope_export.report.write import Report


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an evaluation, a search, a record, a training log and a manifest; not to be changed."""
    return write_results(tmp_path_factory.mktemp("report") / "results")


@pytest.fixture(scope="session")
def written(results: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of `results`."""
    from longrope_export.report.write import write_report

    return write_report(results, tmp_path_factory.mktemp("report") / "page")


@pytest.fixture(scope="session")
def page(written: Report) -> str:
    """Its HTML."""
    return written.page.read_text()
