"""`longrope report`: what a folder holds, as one HTML page and PNG figures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from longrope_export.cli.common import print_json

if TYPE_CHECKING:
    from longrope_export.report.write import Report


@click.command(short_help="One HTML page with plots of what a folder holds.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [default: DIR/report]")
@click.option("--json", "as_json", is_flag=True, help="Print what was found and written as JSON.")
def report(folder: Path, out: Path | None, as_json: bool) -> None:
    """Show what DIR holds: factors, evaluations, searches, training logs, three levels deep.

    Writes report.html, one page that loads nothing from anywhere, and every figure as a PNG beside it. The same results
    give the same bytes.

    \b
    Examples:
      longrope report results
      longrope report factors --out page
    """
    from longrope_export.report.write import write_report

    written = write_report(folder, out)
    if as_json:
        print_json(written.to_dict())
        return
    click.echo("\n".join(_lines(written)))


def _lines(written: Report) -> list[str]:
    from longrope_export.cli.tables import printable

    sources = written.sources
    counts = [
        f"{len(found)} {name if len(found) == 1 else f'{name}s'}"
        for name, found in (
            ("evaluation", sources.evaluations),
            ("record", sources.records),
            ("search journal", sources.searches),
            ("training log", sources.training),
        )
        if found
    ]
    return [
        f"found: {', '.join(counts)}",
        *(f"not shown: {printable(line)}" for line in sources.left_out),
        f"written: {written.page} and {len(written.figures)} figures",
    ]
