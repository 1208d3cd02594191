"""`longrope demo`: the main job on the embedded model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.cli.common import print_json, quiet_libraries

if TYPE_CHECKING:
    from longrope_export.demo_run import DemoResult

_COUNT = click.IntRange(min=1)


@click.command(short_help="The whole job on the embedded model, in a few minutes.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True,
              help="Folder to write.")  # fmt: skip
@click.option("--gradient-budget", type=_COUNT, help="Evaluations of the gradient search.  [default: 20]")
@click.option("--evolution-budget", type=_COUNT, help="Evaluations of Algorithm 1; 1344 is the paper's.  [default: 64]")
@click.option("--report-documents", type=_COUNT, help="Unseen documents in the table.  [default: 16]")
@click.option("--passkeys", type=_COUNT, help="Passkey prompts a length.  [default: 20]")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of both searches and of the passkeys.  [default: 0]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def demo(as_json: bool, **options: Any) -> None:
    """Extend the embedded model from 256 to 2,048 tokens: search, compare, write, prove in llama.cpp.

    \b
    Example:
      longrope demo --out demo-output
    """
    quiet_libraries()
    from longrope_export.demo_run import DemoOptions, run_demo

    given = {name: value for name, value in options.items() if value is not None}
    result = run_demo(DemoOptions(**given), lambda line: click.echo(f"· {line}", err=True))
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)
    if result.verification is not None and result.verification.verdict != "pass":
        sys.exit(1)


def _show(result: DemoResult) -> None:
    from rich.console import Console

    from longrope_export.cli.verify import print_report
    from longrope_export.evaluation.tables import render_comparison

    console = Console()
    console.print(render_comparison(result.comparison))
    console.print(_passkey_table(result.passkey, result.comparison.window))
    if result.verification is not None:
        print_report(result.verification)
    click.echo(f"written: {result.written.target}  (model card: {result.written.target}/README.md)")
    for line in result.written.notes:
        click.echo(f"note: {line}")
    click.echo(_run_lines(result))
    click.echo(f"{result.seconds:.0f} s in all")


def _passkey_table(passkey: dict[str, dict[int, float]], window: int) -> Any:
    from rich.table import Table

    table = Table(title="Passkey retrieval (all digits right, teacher-forced)")
    table.add_column("factors")
    for length in next(iter(passkey.values())):
        table.add_column(f"{length // window}× ({length:,})", justify="right")
    for name, row in passkey.items():
        table.add_row(name, *(f"{share:.0%}" for share in row.values()))
    return table


def _run_lines(result: DemoResult) -> str:
    from longrope_export.converters import recipes

    folder, gguf = str(result.written.folder), str(result.written.gguf)
    parts = {
        "transformers": recipes.transformers_recipe(folder, result.scaling),
        "llama.cpp": recipes.llama_cpp_recipe(gguf, result.scaling),
        "Ollama": recipes.ollama_recipe(gguf, result.scaling),
    }
    return "\n".join(f"\n{name}:\n{code}" for name, code in parts.items())
