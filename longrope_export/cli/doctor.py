"""`longrope doctor`: what is wrong with a file's RoPE scaling, and its repair."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from longrope_export.cli.common import print_json
from longrope_export.cli.tables import print_table

if TYPE_CHECKING:
    from longrope_export.converters.doctor.findings import Finding


@click.command(short_help="Find and mend wrong RoPE scaling in a GGUF file or a model folder.")
@click.argument("path", metavar="FILE_OR_DIR", type=click.Path(path_type=Path))
@click.option(
    "--fix", is_flag=True, help="Mend what can be mended; each file is replaced when the new one is complete."
)
@click.option(
    "--scaling", "record", type=click.Path(path_type=Path),
    help="Record for findings that need one: longrope.json, or any file that carries it. With --fix.",
)  # fmt: skip
@click.option("--strict", is_flag=True, help="Exit with 1 for warnings too, not for errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(path: Path, fix: bool, record: Path | None, strict: bool, as_json: bool) -> None:
    """Name every misconfiguration of RoPE scaling in FILE_OR_DIR: a GGUF file, a config.json, or a folder of them.

    Each finding says how bad it is, what it does to whom, and what mends it. Only headers, configs and a few
    layers' weights are read. Exit code 1 when an error is left. The findings' names: docs/doctor.md.

    \b
    Examples:
      longrope doctor model.gguf
      longrope doctor model.gguf --fix --scaling longrope.json
      longrope doctor ./MODEL --strict --json
    """
    if record is not None and not fix:
        raise click.UsageError("--scaling is for --fix: give both")
    from longrope_export.converters.doctor.examine import examine
    from longrope_export.converters.doctor.repair import repair
    from longrope_export.formats.records import read_scaling

    scaling = None if record is None else read_scaling(record)
    before = examine(path)
    repaired = repair(path, scaling) if fix else []
    left = examine(path) if repaired else before
    mended = [finding for finding in before if not _is_among(finding, left)]
    if as_json:
        print_json({
            "findings": [finding.to_dict() for finding in left],
            "mended": [finding.to_dict() for finding in mended],
            "replaced": [str(file) for file in repaired],
        })  # fmt: skip
    else:
        _print(left, mended, path)
    bad = ("error", "warning") if strict else ("error",)
    if any(finding.severity in bad for finding in left):
        sys.exit(1)


def _is_among(finding: Finding, others: list[Finding]) -> bool:
    return any((finding.rule.name, finding.path) == (other.rule.name, other.path) for other in others)


def _print(findings: list[Finding], mended: list[Finding], path: Path) -> None:
    for finding in mended:
        click.echo(f"mended: {finding.rule.name} {finding.rule.condition} ({Path(finding.path).name})")
    for finding in findings:
        if finding.severity != "information":
            print_table(_rows(finding), title=f"{finding.severity} {finding.rule.name}: {finding.rule.condition}")
    notes = [finding for finding in findings if finding.severity == "information"]
    if notes:
        rows = [(note.rule.name, f"{note.rule.condition} [{note.detail}]: {note.rule.symptom}") for note in notes]
        print_table(dict.fromkeys(rows), title="good to know")
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = sum(finding.severity == "warning" for finding in findings)
    click.echo(f"{path}: {errors} errors, {warnings} warnings, {len(notes)} notes")


def _rows(finding: Finding) -> list[tuple[str, str]]:
    option = f" ({finding.mended_by})" if finding.mended_by else ""
    return [
        ("file", finding.path),
        ("found", finding.detail),
        ("hurts", f"{finding.rule.runtimes}: {finding.rule.symptom}"),
        ("fix", f"{finding.advice}{option}"),
    ]
