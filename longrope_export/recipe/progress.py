"""Which stages of a recipe are finished: a manifest closes a stage's folder, and its stage.json says what it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrope_export.errors import OutputError, StaleStateError
from longrope_export.files import MANIFEST, check_manifest, write_manifest, write_text

STAGE = "stage.json"


def finished_stage(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result that a finished stage left, or None where it is not finished.

    Raises `StaleStateError` when it was made from something else than `identity` says, `InputFileError` when its files
    have changed since.
    """
    if not (folder / MANIFEST).is_file():
        return None
    check_manifest(folder)
    left: dict[str, Any] = json.loads((folder / STAGE).read_text("utf-8"))
    for name, value in identity.items():
        if left["made_from"].get(name) != value:
            raise StaleStateError(
                f"{folder} was made with {name} {left['made_from'].get(name)!r}, and now it is {value!r}; "
                "remove the folder and those after it, or name another --out"
            )
    result: dict[str, Any] = left["result"]
    return result


def finish_stage(folder: Path, identity: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write what the stage left, and the manifest that makes it finished."""
    content = {"made_from": dict(identity), "result": dict(result)}
    write_text(folder / STAGE, json.dumps(content, indent=2) + "\n", overwrite=True)
    write_manifest(folder)


def check_place(out: Path, name: str) -> None:
    """Raise `OutputError` when `out` is neither new, nor empty, nor begun by the recipe `name`."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; name a folder")
    begun = out / "recipe.json"
    if begun.is_file():
        before = json.loads(begun.read_text("utf-8")).get("recipe")
        if before != name:
            raise OutputError(f"{out} holds the recipe {before!r}, not {name!r}; name another --out")
    elif out.is_dir() and any(out.iterdir()):
        raise OutputError(f"{out} is not empty and holds no recipe to continue; name another --out")
