"""Converting a model folder with llama.cpp's own script, and embedding the factors in the same step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from longrope_export.converters.gguf.checks import check_architecture
from longrope_export.converters.gguf.disguise import check_disguise
from longrope_export.converters.gguf.embed import Embedding, embed, usable_architecture
from longrope_export.converters.gguf.stock_script import Echo, check_script, run_stock_script
from longrope_export.converters.hf_config import language_model
from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.files import check_output, output_errors
from longrope_export.formats.hf_config import read_json, text_config
from longrope_export.formats.records import CONFIG_FILE
from longrope_export.scaling import RopeScaling


def convert_with(
    script: str | os.PathLike[str],
    model: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    options: Sequence[str] = (),
    architecture: str | None = None,
    static: bool = False,
    approximate: str | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    echo: Echo | None = None,
) -> tuple[Path, Embedding]:
    """Write `target`: the folder `model` converted by llama.cpp's convert_hf_to_gguf.py at `script`, with `scaling`.

    `options` go to the script, what it prints to `echo`. The script writes into a hidden folder beside `target`, from
    where the file is copied with the factors; needs room for both. What can be known of the model's family is checked
    before the script runs. Returns the file (of a split model the first shard) and what was embedded. Raises as
    `run_stock_script` and `embed`.
    """
    folder, output = Path(model), Path(target)
    check_script(Path(script), options)
    check_output(output, overwrite=overwrite)
    if not (folder / CONFIG_FILE).is_file():
        raise InputFileError(f"{folder} is no model folder: it has no {CONFIG_FILE}")
    if (own := _family_architecture(folder, scaling)) and approximate is None:
        _check_architecture(folder, own, architecture, static=static)
    with output_errors(output), tempfile.TemporaryDirectory(dir=output.absolute().parent, prefix=".convert-") as name:
        converted = run_stock_script(Path(script).absolute(), folder.absolute(), Path(name), options, echo=echo)
        return embed(
            converted, output, scaling, architecture=architecture, static=static, approximate=approximate,
            allow_lossy=allow_lossy, overwrite=overwrite,
        )  # fmt: skip


def _family_architecture(folder: Path, scaling: RopeScaling) -> str | None:
    """The GGUF architecture of a family that the table knows, the record having been checked; None for another."""
    config = read_json(folder / CONFIG_FILE)
    try:
        model = language_model(config)
    except UnsupportedModelError:
        if "model_type" not in text_config(config):
            raise InputFileError(f"{folder / CONFIG_FILE} has no model_type; download it again") from None
        return None
    model.check_record(scaling)
    return model.family.gguf_architectures[0]


def _check_architecture(folder: Path, own: str, wanted: str | None, *, static: bool) -> None:
    """What the script's file could not become is refused before the script runs."""
    if wanted not in (None, own):
        check_disguise(str(folder), own, wanted)
    check_architecture(str(folder), wanted or usable_architecture(own, static=static), static=static)
