"""The texts of a recipe by role: paths, or a split of Python's standard library, written out as files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from longrope_export.errors import InputFileError, RecipeError
from longrope_export.evaluation.stdlib_corpus import Split, documents
from longrope_export.files import atomic_folder
from longrope_export.recipe.schema import Role

# `stdlib:train` is the split "train" of the running Python's standard library.
STDLIB = "stdlib:"


def texts_of(role: Role, texts: Sequence[str], folder: Path, out: Path) -> tuple[str, ...]:
    """Paths of the texts: relative ones stand in `folder`, the standard library's are written to `out`/ROLE once.

    Raises `InputFileError` for a path that is not there, `RecipeError` for an unknown split.
    """
    return tuple(str(_text(role, text, folder, out)) for text in texts)


def _text(role: Role, text: str, folder: Path, out: Path) -> Path:
    if not text.startswith(STDLIB):
        path = folder / text
        if not path.exists():
            raise InputFileError(f"{path} does not exist; give --data {role}=PATH")
        return path
    split = text.removeprefix(STDLIB)
    if split not in get_args(Split):
        raise RecipeError(f"{text[:60]!r} is not a split of the standard library; choose {', '.join(get_args(Split))}")
    target = out / f"{role}-{split}"
    if not target.exists():
        with atomic_folder(target) as partial:
            (partial / "texts").mkdir()
            for document in documents(split):  # type: ignore[arg-type]
                name = re.sub(r"[^A-Za-z0-9_.-]", "_", document.name)
                (partial / "texts" / f"{name}.txt").write_text(document.text, encoding="utf-8")
    return target / "texts"  # the manifest beside them is no text
