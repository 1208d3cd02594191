"""`longrope verify`: prove that transformers and llama.cpp apply the embedded factors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longrope_export.cli.common import print_json, quiet_libraries
from longrope_export.cli.tables import printable

if TYPE_CHECKING:
    from longrope_export.converters.measuring import RegimeResult
    from longrope_export.converters.verify import VerificationReport


@click.command()
@click.argument("path", metavar="DIR_OR_GGUF", type=click.Path(path_type=Path))
@click.option("--scaling", type=click.Path(path_type=Path), help="Record to verify against; default: the files' own.")
@click.option("--source", type=click.Path(path_type=Path), help="Model folder that an unquantised GGUF was made from.")
@click.option("--prefixes", type=click.IntRange(2), default=16, show_default=True, help="Prefix lengths per regime.")
@click.option("--max-prefix", type=click.IntRange(2), help="Longest prefix in tokens; default: 1.25 windows.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the text.")
@click.option("--text", type=click.Path(path_type=Path), help="Text file for the prompts; default: Python's library.")
@click.option("--bound", type=click.FloatRange(0, min_open=True), help="Largest distance in nats; default: by type.")
@click.option("--probe", is_flag=True, help="Check the first two blocks only, for big models.")
@click.option("--threads", type=click.IntRange(1), help="Threads of llama.cpp; default: all.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(
    path: Path,
    scaling: Path | None,
    source: Path | None,
    prefixes: int,
    max_prefix: int | None,
    seed: int,
    text: Path | None,
    bound: float | None,
    probe: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """Run a GGUF in llama.cpp, an HF folder in transformers, and compare them with the reference loader.

    Exits 0 only when every file passes below and above the window: near to the reference with the factors, and five
    times nearer to it than to the one without.

    \b
    Examples:
      longrope verify longer.gguf
      longrope verify OUT --prefixes 32
      longrope verify big.gguf --probe --max-prefix 4096
      longrope verify other.gguf --scaling longrope.json --json
      longrope verify qwen3-as-step35.gguf --source ./qwen3
    """
    from longrope_export.converters.verify import verify as run
    from longrope_export.formats.records import read_scaling

    quiet_libraries()
    report = run(
        path,
        read_scaling(scaling) if scaling else None,
        source=source,
        prefixes=prefixes,
        max_prefix=max_prefix,
        seed=seed,
        text=_read_text(text) if text else None,
        bound=bound,
        probe=probe,
        threads=threads,
    )
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report)
    sys.exit(0 if report.verdict == "pass" else 1)


def print_report(report: VerificationReport) -> None:
    """Print the verdict and one row per file, runtime and regime."""
    from rich.console import Console
    from rich.table import Table

    part = ", without what stands below" if report.left_out else ""
    table = Table(title=f"{report.verdict.upper()}{part}: {printable(report.path)}", title_justify="left")
    for name in ("runtime", "set", "prefixes", "distance", "bound", "to other scalings", "verdict"):
        table.add_column(name)
    for entry in report.regimes:
        found = entry.judgement
        others = "\n".join(f"{other.name}: {other.distance:.2g}" for other in found.hypotheses) or "none differs"
        prefixes = f"{entry.below} ≤ L, {entry.above} > L"
        numbers = (f"{found.distance:.2g}", f"{found.bound:g}")
        table.add_row(_runtime(entry), entry.regime, prefixes, *numbers, others, found.verdict)
    console = Console(markup=False, emoji=False, highlight=False)  # a path may look like markup
    console.print(table)
    for line in _remarks(report):
        console.print(printable(line))


def _runtime(entry: RegimeResult) -> str:
    return f"{entry.runtime} -c {entry.context}" if entry.context else entry.runtime


def _remarks(report: VerificationReport) -> list[str]:
    lines = [
        f"{entry.file}, {entry.runtime}, {entry.regime} set: {entry.judgement.reason}"
        + (f"; it looks like: {', '.join(entry.suspects)}" if entry.suspects else "")
        for entry in report.regimes
        if entry.judgement.verdict != "pass"
    ]
    versions = ", ".join(f"{name} {number}" for name, number in report.versions.items())
    probed = " (first blocks only)" if report.probe else ""
    left_out = [f"left out of the comparison: {line}" for line in report.left_out]
    return [*lines, *left_out, *report.notes, f"distances in nats{probed}; {versions}; {report.seconds:g} s"]


def _read_text(path: Path) -> str:
    from longrope_export.errors import InputFileError

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path} cannot be read as UTF-8 text: {error}") from None
