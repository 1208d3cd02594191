"""What a recipe will do with a model: every stage with its paths, lengths and command, checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from longrope_export.description import ModelDescription, describe
from longrope_export.errors import InputFileError, RecipeError, ScalingError
from longrope_export.lengths import resolve_length
from longrope_export.recipe.commands import TUNED, Paths, arguments, check_options, record_of
from longrope_export.recipe.progress import check_place
from longrope_export.recipe.schema import GIVEN, Recipe, Role, Stage
from longrope_export.recipe.texts import texts_of
from longrope_export.rope.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class Job:
    """A recipe for one model; `texts` replaces the recipe's own by role, `seed` its seed."""

    recipe: Recipe
    model: Path
    out: Path
    texts: Mapping[Role, tuple[str, ...]]
    seed: int | None = None
    dtype: str = "f16"
    verify: bool = True
    allow_lossy: bool = False
    command: str = "longrope extend --recipe"

    @property
    def chosen_seed(self) -> int:
        """The seed of every stage."""
        return self.recipe.seed if self.seed is None else self.seed


@dataclass(frozen=True)
class Step:
    """One stage with its place: what it works on, and the lengths it goes from and to, in tokens."""

    stage: Stage
    folder: Path
    model: Path
    factors: Path | None
    window: int
    target: int
    words: tuple[str, ...]


def plan_recipe(job: Job, *, read_texts: bool = True) -> list[Step]:
    """Every stage with paths and lengths, checked against the model; nothing is run.

    Raises `RecipeError` for what does not fit, `UnsupportedModelError` and `InputFileError` for the model and texts.
    """
    recipe, description = job.recipe, describe(job.model)
    check_options(recipe, recipe.name)
    if recipe.window is not None and description.window != recipe.window:
        raise RecipeError(
            f"the recipe {recipe.name} is for a window of {recipe.window:,} tokens, and {job.model} has "
            f"{description.window:,}; choose another recipe, or change its window and lengths"
        )
    check_place(job.out, recipe.name)
    texts = recipe_texts(job) if read_texts else {}
    for length in recipe.report.lengths:
        resolve_length(length, description.window)
    return _Planner(job, description, texts).steps()


class _Planner:
    """Goes through the stages once and keeps what each leaves to the later ones."""

    def __init__(self, job: Job, description: ModelDescription, texts: Mapping[Role, tuple[str, ...]]) -> None:
        self._job, self._texts = job, texts
        self._models = {GIVEN: job.model}
        self._windows = {GIVEN: description.window}
        self._factors: dict[str, tuple[Path, int]] = {}
        self._last_tuned, self._last_searched = GIVEN, ""

    def steps(self) -> list[Step]:
        return [self._step(number, stage) for number, stage in enumerate(self._job.recipe.stages, 1)]

    def _step(self, number: int, stage: Stage) -> Step:
        place = f"{self._job.recipe.name}, stage {number} ({stage.name})"
        on = stage.model or self._last_tuned
        folder = self._job.out / f"{number}-{stage.name}"
        window = self._windows[on]
        factors, target = self._asked(stage, folder, window, place)
        if target <= window and stage.kind == "search":
            raise RecipeError(f"{place}: {target:,} tokens are no longer than the {window:,} of {on}; ask for more")
        texts = [Path(text) for text in self._texts.get("train" if stage.kind == "finetune" else "search", ())]
        paths = Paths(self._models[on], factors, texts or [Path("TEXTS")], folder)
        words = arguments(stage, paths, self._job.chosen_seed, target)
        if stage.kind == "finetune":
            self._check_length(stage, target, place)
            self._models[stage.name], self._windows[stage.name] = folder / TUNED, target
            self._last_tuned = stage.name
        else:
            self._factors[stage.name] = record_of(stage, folder), target
            self._last_searched = stage.name
        return Step(stage, folder, paths.model, factors, window, target, tuple(words))

    def _asked(self, stage: Stage, folder: Path, window: int, place: str) -> tuple[Path | None, int]:
        if stage.kind == "search":
            return None, _length(str(stage.options["to"]), window, place)
        if stage.factors not in METHODS:
            return self._factors[stage.factors or self._last_searched]
        if "to" not in stage.options:
            raise RecipeError(f"{place}: a closed form needs to: the window that it is made for")
        return folder / "factors.json", _length(str(stage.options["to"]), window, place)

    def _check_length(self, stage: Stage, target: int, place: str) -> None:
        asked = stage.options.get("length")
        if asked is None:
            return
        length = _length(str(asked), self._windows[GIVEN], place)
        if length > target:
            raise RecipeError(f"{place}: rows of {length:,} tokens are longer than its factors' {target:,}")


def _length(text: str, window: int, place: str) -> int:
    try:
        return resolve_length(text, window)
    except ScalingError as error:
        raise RecipeError(f"{place}: {error}") from None


def recipe_texts(job: Job) -> dict[Role, tuple[str, ...]]:
    """Paths by role, of every role that the recipe needs; texts of the standard library are written to `out`/texts."""
    needed: dict[Role, bool] = {
        "search": any(stage.kind != "finetune" for stage in job.recipe.stages),
        "train": any(stage.kind == "finetune" for stage in job.recipe.stages),
        "report": bool(job.recipe.report.lengths),
    }
    found: dict[Role, tuple[str, ...]] = {}
    for role, wanted in needed.items():
        if not wanted:
            continue
        texts = job.texts.get(role) or job.recipe.texts.get(role)
        if not texts:
            raise InputFileError(f"the recipe {job.recipe.name} needs texts for {role}: give --data {role}=PATH")
        found[role] = texts_of(role, texts, job.recipe.folder if not job.texts.get(role) else Path(), job.out / "texts")
    if len({path for paths in found.values() for path in paths}) < sum(map(len, found.values())):
        raise InputFileError("the same text is given for two roles; what is searched on must not be reported on")
    return found
