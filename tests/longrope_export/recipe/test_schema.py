"""Recipes as files: what is read, and every way in which one is refused, by stage and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from longrope_export.errors import InputFileError, RecipeError
from longrope_export.recipe.commands import check_options
from longrope_export.recipe.schema import parse_recipe, read_recipe, shipped_recipes

SEARCH = {"search": {"to": "8x"}}
TUNE = {"finetune": {"steps": 3}}


def _parse(*stages: Any, **top: Any) -> Any:
    recipe = parse_recipe({"stages": list(stages), **top}, Path("some.yaml"))
    check_options(recipe, recipe.name)
    return recipe


def test_everything_of_a_recipe_is_read(tmp_path: Path) -> None:
    content = {
        "about": "words", "window": 256, "seed": 3, "texts": {"search": "a.txt", "train": ["b", "c"]},
        "stages": [
            {"name": "one", "search": {"to": "2k", "budget": 2}},
            {"name": "tune", "factors": "one", "finetune": {"steps": 5}},
            {"name": "two", "model": "given", "search": {"to": "4k"}},
            {"name": "short", "model": "tune", "factors": "one", "recover": None},
        ],
        "report": {"lengths": [256, "2k"], "documents": 3, "passkeys": 4, "baselines": ["yarn"]},
    }  # fmt: skip
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    recipe = read_recipe(str(path))
    assert (recipe.name, recipe.about, recipe.window, recipe.seed) == ("mine", "words", 256, 3)
    assert recipe.texts == {"search": ("a.txt",), "train": ("b", "c")}
    assert [(s.name, s.kind, s.model, s.factors) for s in recipe.stages] == [
        ("one", "search", None, None), ("tune", "finetune", None, "one"), ("two", "search", "given", None),
        ("short", "recover", "tune", "one"),
    ]  # fmt: skip
    assert recipe.stages[0].options == {"to": "2k", "budget": 2}
    report = recipe.report
    assert (report.lengths, report.documents, report.passkeys, report.baselines) == (("256", "2k"), 3, 4, ("yarn",))


def test_stages_without_a_name_get_one() -> None:
    assert [stage.name for stage in _parse(SEARCH, TUNE).stages] == ["search-1", "finetune-2"]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([], "has no stages"),
        ([{"search": {"to": "8x"}, "finetune": {}}], "stage 1 must be exactly one of"),
        ([{"name": "x"}], "stage 1 must be exactly one of"),
        (["search"], "stage 1 must be a mapping"),
        ([{**SEARCH, "speed": 3}], "stage 1: 'speed' is not known"),
        ([{**SEARCH, "name": "A B"}], "cannot be its name"),
        ([{**SEARCH, "name": "given"}], "cannot be its name"),
        ([{**SEARCH, "name": "../up"}], "cannot be its name"),
        ([{**SEARCH, "name": "a"}, {**SEARCH, "name": "a"}], "another stage has that name"),
        ([{**SEARCH, "factors": "yarn"}], "factors belong to finetune and recover"),
        ([TUNE], "there are no factors yet"),
        ([SEARCH, {**TUNE, "factors": "nothing"}], "factors is 'nothing'"),
        ([{**SEARCH, "name": "a"}, {**SEARCH, "model": "a"}], "model is 'a'; choose given"),
        ([{"search": {}}], "to is missing"),
        ([{"search": {"to": "8x", "data": "x"}}], "data is set by the recipe"),
        ([{"search": {"to": "8x", "bugdet": 3}}], "bugdet"),
        ([{"search": {"to": "far"}}], "far"),
        ([{"search": {"to": "8x", "strategy": "luck"}}], "luck"),
        ([SEARCH, {"finetune": {"steps": "many"}}], "many"),
        ([SEARCH, {"finetune": {"positions": "sideways"}}], "sideways"),
    ],
)
def test_what_is_wrong_in_a_stage_is_named(stages: list[Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as caught:
        _parse(*stages)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("top", "words"),
    [
        ({"window": "big"}, "window must be a whole number"),
        ({"window": True}, "window must be a whole number"),
        ({"texts": {"test": "x"}}, "texts: 'test' is not known"),
        ({"texts": {"search": 3}}, "search must be a text or a list"),
        ({"report": {"lengths": ["far"]}}, "report: 'far' is not a length"),
        ({"report": {"baselines": ["luck"]}}, "baseline 'luck' is not known"),
        ({"report": {"documents": 0}}, "documents must be at least 1"),
        ({"code": "import os"}, "'code' is not known"),
    ],
)
def test_what_is_wrong_outside_the_stages_is_named(top: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        _parse(SEARCH, **top)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"stages: [", "is not YAML"),
        (b"!!python/object/apply:os.system [true]", "is not YAML"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"- 1\n- 2\n", "must be a mapping"),
        (b"#" * (1 << 17), "a recipe has at most"),
        (b"[" * 30_000, "is not YAML"),
    ],
)
def test_hostile_files_are_one_line(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(data)
    with pytest.raises((RecipeError, InputFileError), match=words) as caught:
        read_recipe(str(path))
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(InputFileError, match="shipped recipes: demo, longrope, longrope2, pose"):
        read_recipe("nothing")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_shipped_recipes_are_right(name: str) -> None:
    recipe = read_recipe(name)
    check_options(recipe, name)
    assert recipe.about


def test_the_paper_s_recipe_has_its_hyper_parameters() -> None:
    """arXiv 2402.13753, section 4.2 and appendix: 400 steps at 128k, 600 at 256k, 32 rows, 2e-5 falling linearly."""
    stages = {stage.name: stage for stage in read_recipe("longrope").stages}
    tuned = [stage.options for stage in stages.values() if stage.kind == "finetune"]
    assert [(each["steps"], each["batch"], each["length"]) for each in tuned] == [(400, 32, "128k"), (600, 32, "256k")]
    assert {(each["learning-rate"], each["schedule"]) for each in tuned} == {(2e-5, "linear")}
    assert [stage.options["to"] for stage in stages.values() if stage.kind == "search"] == ["128k", "256k", "2048k"]
    assert {stage.options["strategy"] for stage in stages.values() if stage.kind != "finetune"} == {"evolution"}
    # The factors for 256k are searched on the model before tuning, those for 2048k on the tuned one.
    assert (stages["search-256k"].model, stages["search-2048k"].model) == ("given", None)
    assert stages["recover-short"].options["sets"] == "8k"
