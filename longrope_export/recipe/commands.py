"""Every stage as the `longrope` command that it is: what a recipe runs can be run by hand."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from longrope_export.errors import RecipeError
from longrope_export.formats.records import RECORD_FILE
from longrope_export.recipe.schema import Recipe, Stage

# Where a fine-tuned model stands in its stage's folder.
TUNED = "tuned"
# Set by the recipe's own keys, so that every stage works on what the one before it left.
_OWN = ("data", "out", "scaling", "init", "keep-long", "json", "dry-run")


@dataclass(frozen=True)
class Paths:
    """What one stage reads and where it writes: a model, a record (None for a search), texts, and its folder."""

    model: Path
    factors: Path | None
    texts: Sequence[Path]
    folder: Path


def arguments(stage: Stage, paths: Paths, seed: int, target: int | None = None) -> list[str]:
    """Arguments of `longrope` for a stage; `target` is the recovered record's length in tokens."""
    own = [f"--data={text}" for text in paths.texts]
    if stage.kind == "finetune":
        own += [f"--scaling={paths.factors}", f"--out={paths.folder / TUNED}"]
        return ["finetune", str(paths.model), *own, *_options(stage, seed, without=("to",))]
    own += [f"--out={paths.folder}"]
    if stage.kind == "recover":
        own += [f"--to={target}", f"--init={paths.factors}", "--keep-long"]
    return ["search", str(paths.model), *own, *_options(stage, seed)]


def shell_line(words: Sequence[str]) -> str:
    """The command as it is typed."""
    return shlex.join(["longrope", *words])


def parsed(words: Sequence[str], where: str) -> dict[str, Any]:
    """The command's options as click reads them, for its configuration; raises `RecipeError` for one that it refuses."""
    from longrope_export.cli.main import cli

    command = cli.get_command(click.Context(cli), words[0])
    assert command is not None
    try:
        with command.make_context(words[0], list(words[1:])) as context:
            return {name: value for name, value in context.params.items() if name not in ("as_json", "dry_run")}
    except click.ClickException as error:
        raise RecipeError(f"{where}: {error.format_message()}") from None


def record_of(stage: Stage, folder: Path) -> Path:
    """Where a stage's factors are once it is finished."""
    return folder / TUNED / RECORD_FILE if stage.kind == "finetune" else folder / RECORD_FILE


def check_options(recipe: Recipe, where: str) -> None:
    """Raise `RecipeError` for options that no command has, or that a recipe sets itself; nothing is read."""
    somewhere = Path("somewhere")
    for number, stage in enumerate(recipe.stages, 1):
        place = f"{where}, stage {number} ({stage.name})"
        for name in stage.options:
            if name in _OWN:
                raise RecipeError(f"{place}: {name} is set by the recipe itself; leave it out")
        if stage.kind == "search" and "to" not in stage.options:
            raise RecipeError(f"{place}: to is missing: the new window, such as 32k or 8x")
        parsed(arguments(stage, Paths(somewhere, somewhere, [somewhere], somewhere), recipe.seed, 1024), place)


def _options(stage: Stage, seed: int, without: Sequence[str] = ()) -> list[str]:
    given: Mapping[str, Any] = {"seed": seed, **{k: v for k, v in stage.options.items() if k not in without}}
    return [word for name, value in given.items() for word in _words(name, value)]


def _words(name: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if value is False:
        return [f"--no-{name}"]
    if isinstance(value, list):
        return [word for each in value for word in _words(name, each)]
    return [f"--{name}={value}"]
