"""What a recipe says: its stages, its texts and its report, read from YAML and checked before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from longrope_export.errors import InputFileError, RecipeError
from longrope_export.lengths import is_length
from longrope_export.rope.methods import METHODS

Kind = Literal["search", "finetune", "recover"]
Role = Literal["search", "train", "report"]
SHIPPED = Path(__file__).parent / "shipped"
# A recipe is a page of text; anything else is not one.
_MOST_BYTES = 1 << 16
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
# The model on the command line, in the place of a stage's name.
GIVEN = "given"


@dataclass(frozen=True)
class Stage:
    """One stage. `options` are those of `longrope search` or `longrope finetune`, by their field names.

    `model` names the stage whose model is worked on ("given": the one on the command line; None: the last one that was tuned);
    `factors` names the search whose factors are tuned with or recovered from, or a closed form (None: the last search).
    """

    name: str
    kind: Kind
    options: Mapping[str, Any]
    model: str | None = None
    factors: str | None = None


@dataclass(frozen=True)
class ReportPlan:
    """What is measured before and after every stage: perplexity on `documents` report texts and passkeys, by length."""

    lengths: tuple[str, ...] = ()
    documents: int = 8
    passkeys: int = 0
    baselines: tuple[str, ...] = ("pi", "ntk", "yarn")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `window` is the one that the model must have, `texts` the paths by role."""

    name: str
    about: str
    stages: tuple[Stage, ...]
    window: int | None = None
    seed: int = 0
    texts: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    report: ReportPlan = ReportPlan()
    folder: Path = Path()


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def read_recipe(source: str) -> Recipe:
    """The recipe in a YAML file, or the shipped one of that name.

    Raises `InputFileError` when it cannot be read, `RecipeError` for whatever is wrong in it, by stage and key.
    """
    import yaml

    path = shipped_recipes().get(source, Path(source))
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise RecipeError(f"{path} has {path.stat().st_size:,} bytes; a recipe has at most {_MOST_BYTES:,}")
        content = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        known = ", ".join(shipped_recipes())
        raise InputFileError(f"{path} cannot be read ({error.strerror}); shipped recipes: {known}") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputFileError(f"{path} is not YAML: {first}") from None
    return parse_recipe(content, path)


def parse_recipe(content: Any, path: Path) -> Recipe:
    """Check the YAML's content; raises `RecipeError`."""
    top = _Reader(content, str(path), ("about", "window", "seed", "texts", "stages", "report"))
    entries = top.get("stages", list)
    if not entries:
        raise RecipeError(f"{path} has no stages; give a list of search, finetune and recover stages")
    stages = tuple(_stage(entry, number, str(path)) for number, entry in enumerate(entries, 1))
    _check_references(stages, str(path))
    return Recipe(
        name=path.stem, about=top.get("about", str, ""), stages=stages, window=top.get("window", int, None),
        seed=top.get("seed", int, 0), texts=_texts(top.get("texts", dict, {}), f"{path}, texts"),
        report=_report(top.get("report", dict, {}), f"{path}, report"), folder=path.parent,
    )  # fmt: skip


def _stage(entry: Any, number: int, where: str) -> Stage:
    place = f"{where}, stage {number}"
    reader = _Reader(entry, place, ("name", "model", "factors", *get_args(Kind)))
    kinds = [kind for kind in get_args(Kind) if kind in reader.content]
    if len(kinds) != 1:
        raise RecipeError(f"{place} must be exactly one of {', '.join(get_args(Kind))}")
    (kind,) = kinds
    name = reader.get("name", str, f"{kind}-{number}")
    if not _NAME.fullmatch(name) or name == GIVEN:
        raise RecipeError(f"{place}: {name[:60]!r} cannot be its name; use up to 40 of a-z, 0-9 and -")
    factors = reader.get("factors", str, None)
    if factors and kind == "search":
        raise RecipeError(f"{place}: factors belong to finetune and recover; a search finds its own")
    options = {str(key): value for key, value in reader.get(kind, dict, {}).items()}
    return Stage(name, kind, options, reader.get("model", str, None), factors)


def _check_references(stages: tuple[Stage, ...], where: str) -> None:
    """Every name refers to an earlier stage that gives what is asked of it."""
    tuned, searched = [GIVEN], list[str]()
    for number, stage in enumerate(stages, 1):
        place = f"{where}, stage {number} ({stage.name})"
        if stage.name in {*tuned, *searched}:
            raise RecipeError(f"{place}: another stage has that name")
        if stage.model is not None and stage.model not in tuned:
            raise RecipeError(f"{place}: model is {stage.model!r}; choose {', '.join(tuned)}")
        if stage.factors is not None and stage.factors not in {*searched, *METHODS}:
            raise RecipeError(f"{place}: factors is {stage.factors!r}; choose {', '.join([*searched, *METHODS])}")
        if stage.kind != "search" and stage.factors is None and not searched:
            raise RecipeError(f"{place}: there are no factors yet; put a search before it, or name a closed form")
        (tuned if stage.kind == "finetune" else searched).append(stage.name)


def _texts(content: dict[Any, Any], where: str) -> dict[Role, tuple[str, ...]]:
    reader = _Reader(content, where, get_args(Role))
    texts: dict[Role, tuple[str, ...]] = {}
    for role in get_args(Role):
        if role in reader.content:
            texts[role] = reader.strings(role)
    return texts


def _report(content: dict[Any, Any], where: str) -> ReportPlan:
    reader = _Reader(content, where, ("lengths", "documents", "passkeys", "baselines"))
    default = ReportPlan()
    lengths = tuple(str(each) for each in reader.get("lengths", list, []))
    for length in lengths:
        if not is_length(length):
            raise RecipeError(f"{where}: {length[:40]!r} is not a length; write 16384, 32k or 4x")
    plan = ReportPlan(
        lengths, reader.get("documents", int, default.documents), reader.get("passkeys", int, 0),
        reader.strings("baselines") if "baselines" in reader.content else default.baselines,
    )  # fmt: skip
    for name in plan.baselines:
        if name not in METHODS:
            raise RecipeError(f"{where}: baseline {name[:40]!r} is not known; choose {', '.join(METHODS)}")
    if plan.documents < 1 or plan.passkeys < 0:
        raise RecipeError(f"{where}: documents must be at least 1 and passkeys at least 0")
    return plan


class _Reader:
    """A mapping whose keys are all known, read by key and type."""

    def __init__(self, content: Any, where: str, known: tuple[str, ...]) -> None:
        if not isinstance(content, dict):
            raise RecipeError(f"{where} must be a mapping of {', '.join(known)}")
        if unknown := [key for key in content if key not in known]:
            raise RecipeError(f"{where}: {str(unknown[0])[:60]!r} is not known; choose {', '.join(known)}")
        self.content, self._where = content, where

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of `key`; `default` where it is missing or empty."""
        value = self.content.get(key)
        if value is None and default is not ...:
            return default
        if not isinstance(value, kind) or isinstance(value, bool):
            raise RecipeError(f"{self._where}: {key} must be a {_WORDS[kind]}")
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of texts, or one text alone."""
        value = self.content[key]
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(each, str) for each in values):
            raise RecipeError(f"{self._where}: {key} must be a text or a list of texts")
        return tuple(values)


_WORDS = {str: "text", int: "whole number", list: "list", dict: "mapping"}
