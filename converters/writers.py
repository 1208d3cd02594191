"""Writers of further targets, which other packages register under the entry-point group `longrope_export.writers`."""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Protocol, cast

from longrope_export.converters.lossy import refuse_losses
from longrope_export.description import describe
from longrope_export.errors import MissingDependencyError, OutputError, UnsupportedModelError
from longrope_export.files import atomic_folder, write_text
from longrope_export.formats.records import RECORD_FILE
from longrope_export.scaling import RopeScaling

GROUP = "longrope_export.writers"


class Writer(Protocol):
    """What an entry point names: a class without arguments, or an object, with these two methods."""

    def losses(self, model: Path, scaling: RopeScaling) -> list[str]:
        """What the target will not apply, one sentence each; the user must allow it before `write` is called."""

    def write(self, model: Path, scaling: RopeScaling, folder: Path) -> None:
        """Write the target's files into `folder`, which is empty; it becomes the output when this returns."""


def writer_names() -> list[str]:
    """Names of the writers that installed packages register."""
    return sorted(_found())


def find_writer(name: str) -> Writer:
    """The registered writer `name`.

    Raises `UnsupportedModelError` when no package registers it, `MissingDependencyError` when its package cannot
    be imported, `OutputError` when it is no writer or two packages register the name.
    """
    found = _found().get(name, [])
    if not found:
        known = ", ".join(writer_names()) or "none"
        raise UnsupportedModelError(f"no installed package has a writer {name!r}; there are: {known}")
    if len({entry.value for entry in found}) > 1:
        raise OutputError(f"several packages have a writer {name!r}: {', '.join(entry.value for entry in found)}")
    try:
        loaded = found[0].load()
    except (ImportError, AttributeError) as error:
        raise MissingDependencyError(f"the writer {name!r} ({found[0].value}) cannot be loaded: {error}") from error
    writer = loaded() if isinstance(loaded, type) else loaded
    if not all(callable(getattr(writer, method, None)) for method in ("losses", "write")):
        raise OutputError(f"{found[0].value} is no writer: it needs the methods losses and write")
    return cast(Writer, writer)


def write_with(
    name: str,
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    allow_lossy: bool = False,
) -> list[str]:
    """Write the folder `target` from a model folder or GGUF file with the registered writer `name`.

    The record is checked against the model first, and stands in the folder as longrope.json; a manifest is added.
    Returns what the target will not apply, which is refused unless `allow_lossy`. Raises what `find_writer`,
    `describe` and the writer raise, `ScalingError`, `LossyTargetError`, and `OutputError`.
    """
    writer, source = find_writer(name), Path(model)
    described = describe(source)
    scaling.check_model(described.rotary_dim, described.rope_theta)
    losses = refuse_losses(str(target), list(writer.losses(source, scaling)), allow_lossy=allow_lossy)
    with atomic_folder(target) as partial:
        writer.write(source, scaling, partial)
        write_text(partial / RECORD_FILE, scaling.to_json(), overwrite=True)
    return losses


def _found() -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        found.setdefault(entry.name, []).append(entry)
    return found
