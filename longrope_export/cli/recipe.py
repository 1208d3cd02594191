"""`longrope extend --recipe`: the stages of a recipe, planned or run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from longrope_export.cli.common import print_json, quiet_libraries
from longrope_export.cli.tables import print_cells

if TYPE_CHECKING:
    from longrope_export.recipe.plan import Step
    from longrope_export.recipe.schema import Role

# Options of `extend` that a recipe understands; the others belong to a single search or closed form.
_USED = ("model", "recipe", "out", "data", "seed", "dtype", "verify", "allow_lossy", "dry_run", "as_json")


def extend_by_recipe(options: Mapping[str, Any]) -> None:
    """Plan or follow the recipe that `extend`'s options name; what is finished is not done again."""
    from longrope_export.recipe.plan import Job, plan_recipe
    from longrope_export.recipe.run import run_recipe
    from longrope_export.recipe.schema import read_recipe

    context = click.get_current_context()
    for name in options:
        given = context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
        if given and name not in _USED:
            raise click.UsageError(f"--{name.replace('_', '-')} does not go with --recipe; write it into its stage")
    recipe = read_recipe(options["recipe"])
    seed = options["seed"] if context.get_parameter_source("seed") == click.core.ParameterSource.COMMANDLINE else None
    command = shlex.join(["longrope", *sys.argv[1:]])
    job = Job(
        recipe=recipe, model=options["model"], out=options["out"] or Path(f"{recipe.name}-out"),
        texts=texts_by_role(map(str, options["data"])), seed=seed, dtype=options["dtype"],
        verify=options["verify"] is not False, allow_lossy=options["allow_lossy"], command=command,
    )  # fmt: skip
    if options["dry_run"]:
        steps = plan_recipe(job, read_texts=False)
        print_json([_planned(step) for step in steps]) if options["as_json"] else click.echo(_plan_lines(steps))
        return
    quiet_libraries()
    try:
        report = run_recipe(job, lambda line: click.echo(line, err=True))
    except KeyboardInterrupt:
        click.echo(
            f"stopped; finished stages are kept, and so is the work of this one. To continue:\n  {command}", err=True
        )
        sys.exit(130)
    print_json(report) if options["as_json"] else _print(report)
    if report.get("verdict") not in (None, "pass"):
        sys.exit(1)


def texts_by_role(values: Iterable[str]) -> dict[Role, tuple[str, ...]]:
    """`search=PATH`, … as paths by role; raises `click.UsageError` for anything else."""
    from longrope_export.recipe.schema import Role

    texts: dict[Role, tuple[str, ...]] = {}
    for value in values:
        role, sign, path = value.partition("=")
        if not sign or role not in get_args(Role):
            raise click.UsageError(
                f"--data {value}: with --recipe write ROLE=PATH; roles are {', '.join(get_args(Role))}"
            )
        texts[role] = (*texts.get(role, ()), path)  # type: ignore[index,call-overload]
    return texts


def _planned(step: Step) -> dict[str, Any]:
    from longrope_export.recipe.commands import shell_line
    from longrope_export.recipe.workload import workload

    work = workload(step)
    return {
        "stage": step.stage.name, "kind": step.stage.kind, "window": step.window, "target": step.target,
        "model": str(step.model), "factors": None if step.factors is None else str(step.factors),
        "options": dict(step.stage.options), "workload": None if work is None else str(work), "command": shell_line(step.words),
    }  # fmt: skip


def _plan_lines(steps: Sequence[Step]) -> str:
    lines = [f"{len(steps)} stages:"]
    for number, step in enumerate(steps, 1):
        planned = _planned(step)
        lines += [f"{number}. {step.stage.name}: {step.stage.kind}, {step.window:,} → {step.target:,} tokens"]
        lines += [f"   {planned[what]}" for what in ("workload", "command") if planned[what]]
    return "\n".join(lines)


def _print(report: Mapping[str, Any]) -> None:
    from longrope_export.recipe.output import table_of

    scaling = report["scaling"]
    window, target = scaling["original_max_position_embeddings"], scaling["max_position_embeddings"]
    if table := table_of(report["stages"]):
        click.echo("perplexity on report documents, with the share of passkeys found:")
        print_cells(table)
    click.echo(f"{report['output']}: window {window:,} → {target:,} (recipe {report['recipe']})")
    for word, key in (("lost", "lossy"), ("note", "notes")):
        for line in report[key]:
            click.echo(f"{word}: {line}")
    if "verdict" in report:
        click.echo(f"verify: {report['verdict']}")
