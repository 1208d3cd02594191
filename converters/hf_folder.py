"""Writing a transformers model folder that carries a `RopeScaling`; tensors are copied as they are."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.converters.copying import copy_range
from longrope_export.converters.gguf.checks import composition_losses, window_losses
from longrope_export.converters.gguf.dequantise import (
    check_dequantisable,
    save_dequantised,
    tokenizer_losses,
)
from longrope_export.converters.hf_config import json_text, language_model
from longrope_export.converters.hf_profiles import DEFAULT, profile_config
from longrope_export.converters.lossy import hf_losses, refuse_losses
from longrope_export.converters.safetensors import write_safetensors_metadata
from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.files import MANIFEST, atomic_folder, atomic_output, output_errors, write_text
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_shards import refuse_split
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.hf_description import weight_files
from longrope_export.formats.records import CONFIG_FILE, RECORD_FILE, SAFETENSORS_KEY
from longrope_export.scaling import RopeScaling

# Weights in other forms would contradict the shards that we write, and pickles are never opened.
_OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite",
    ".safetensors",
)  # fmt: skip


def write_hf_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    profile: str = DEFAULT,
    allow_lossy: bool = False,
    add: Callable[[Path], None] | None = None,
) -> list[str]:
    """Write the folder `target`: the model folder `source` with `scaling` in config.json and every shard's
    header.

    `profile` is the default or one of `hf_profiles.PROFILES`. Tokenizer and other small files are copied, links are
    followed, nothing is written through one. `add` may write further files into the unfinished folder; the manifest
    covers them. Returns what stock transformers and the profile's runtime will not apply, which is refused unless
    `allow_lossy`. Raises `InputFileError` for a damaged folder, `UnsupportedModelError` for other weights than
    safetensors, an unknown family or profile, `ScalingError` when the record belongs to another model,
    `LossyTargetError`, and `OutputError`.
    """
    folder = Path(source)
    plan = plan_folder(folder, scaling, name=str(target), profile=profile, allow_lossy=allow_lossy)
    with atomic_folder(target) as partial:
        for shard in plan.shards:
            write_safetensors_metadata(shard, partial / shard.name, {SAFETENSORS_KEY: plan.scaling.to_json()})
        for file in _other_files(folder, plan.shards):
            if file.name not in plan.texts:
                _copy_file(file, partial / file.name)
        for name, text in plan.texts.items():
            write_text(partial / name, text)
        if add is not None:
            add(partial)
    return plan.losses


@dataclass(frozen=True)
class FolderPlan:
    """What a folder with a record consists of: shards whose headers get it, the texts of changed files by name
    (config.json last), the record as the profile has it, and the losses.
    """

    shards: list[Path]
    texts: dict[str, str]
    scaling: RopeScaling
    losses: list[str]


def plan_folder(
    folder: Path, scaling: RopeScaling, *, name: str, profile: str = DEFAULT, allow_lossy: bool = False,
    config: dict[str, Any] | None = None,
) -> FolderPlan:  # fmt: skip
    """Read and check all that `write_hf_folder` needs; `config` replaces that of the folder. Raises as it does."""
    config = read_json(folder / CONFIG_FILE) if config is None else config
    shards = model_shards(folder)
    changed, scaling, runtime_losses = profile_config(config, scaling, profile)
    model = language_model(config)
    losses = runtime_losses + hf_losses(scaling) + model.window_losses(scaling) + model.composition_losses(scaling)
    refuse_losses(name, losses, allow_lossy=allow_lossy)
    side_files = _extended_side_files(folder, scaling.max_position_embeddings)
    texts = {file: json_text(values) for file, values in side_files.items()}
    texts |= {RECORD_FILE: scaling.to_json(), CONFIG_FILE: json_text(changed)}
    return FolderPlan(shards, texts, scaling, losses)


def gguf_to_hf_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    dtype: str = "f32",
    profile: str = DEFAULT,
    allow_lossy: bool = False,
    add: Callable[[Path], None] | None = None,
) -> list[str]:
    """Write the folder `target`: the GGUF `source` dequantised to `dtype` (f32, f16, bf16), with `scaling`.

    Needs torch and memory for all weights at once, and room for a second copy of them beside `target`.
    Returns and raises as `write_hf_folder`; also raises `MissingDependencyError` without transformers.
    """
    refuse_split(source)
    header = read_gguf_header(source)
    check_dequantisable(dtype)
    own = window_losses(header, scaling) + composition_losses(header, scaling) + tokenizer_losses(header)
    refuse_losses(str(target), hf_losses(scaling) + own, allow_lossy=allow_lossy)
    parent, window = Path(target).absolute().parent, scaling.original_max_position_embeddings
    with contextlib.ExitStack() as stack:
        with output_errors(Path(target)):
            parent.mkdir(parents=True, exist_ok=True)
            name = stack.enter_context(tempfile.TemporaryDirectory(dir=parent, prefix=".dequantised-"))
            save_dequantised(header, Path(name), dtype=dtype, window=window)
        return own + write_hf_folder(name, target, scaling, profile=profile, allow_lossy=allow_lossy, add=add)


def model_shards(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a model folder (not a second copy, such as Mistral's
    `consolidated.safetensors`).

    Raises `InputFileError` when one is missing, `UnsupportedModelError` when the weights have another form.
    """
    found = weight_files(folder)
    if not found:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in _OTHER_WEIGHTS)
        if others:
            raise UnsupportedModelError(
                f"{folder} holds its weights in {others[0]}, which may run code when opened; save it as safetensors"
            )
        raise InputFileError(f"{folder} has no .safetensors weights")
    return found


def _other_files(folder: Path, shards: list[Path]) -> list[Path]:
    ours = {CONFIG_FILE, RECORD_FILE, MANIFEST, *(shard.name for shard in shards)}
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and path.name not in ours
        and not path.name.startswith(".")
        and not path.name.lower().endswith((*_OTHER_WEIGHTS, ".bin.index.json"))
    ]


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as original, atomic_output(target) as file:
        copy_range(original, file, 0, source.stat().st_size)


def _extended_side_files(folder: Path, window: int) -> dict[str, dict[str, Any]]:
    """Side files that change, by name: the tokenizer takes the longer window, and generation uses the cache that
    a trainer may have turned off.
    """
    changed: dict[str, dict[str, Any]] = {}
    tokenizer, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    if tokenizer.is_file():
        values = read_json(tokenizer)
        limit = values.get("model_max_length")
        if isinstance(limit, int) and limit < window:
            changed[tokenizer.name] = {**values, "model_max_length": window}
    if generation.is_file():
        values = read_json(generation)
        if values.get("use_cache") is False:
            changed[generation.name] = {**values, "use_cache": True}
    return changed
