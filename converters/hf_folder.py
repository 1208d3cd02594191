"""Writing a transformers model folder that carries a `RopeScaling`; tensors are copied as they are."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from longrope_export.converters.copying import copy_range
from longrope_export.converters.gguf.checks import composition_losses, window_losses
from longrope_export.converters.gguf.dequantise import (
    check_dequantisable,
    save_dequantised,
    tokenizer_losses,
)
from longrope_export.converters.hf_config import extended_config, json_text, language_model
from longrope_export.converters.lossy import hf_losses, refuse_losses
from longrope_export.converters.safetensors import write_safetensors_metadata
from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.files import MANIFEST, atomic_folder, atomic_output, write_text
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.records import CONFIG_FILE, RECORD_FILE, SAFETENSORS_KEY
from longrope_export.scaling import RopeScaling

INDEX = "model.safetensors.index.json"
# Weights in other forms would contradict the shards that we write, and pickles are never opened.
_OTHER_WEIGHTS = (
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".onnx", ".ot", ".gguf", ".tflite",
)  # fmt: skip


def write_hf_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    allow_lossy: bool = False,
    add: Callable[[Path], None] | None = None,
) -> list[str]:
    """Write the folder `target`: the model folder `source` with `scaling` in config.json and every shard's
    header.

    Tokenizer and other small files are copied, links are followed, nothing is written through one. `add` may
    write further files into the unfinished folder; the manifest covers them. Returns what stock transformers
    will not apply, which is refused unless `allow_lossy`. Raises `InputFileError` for a damaged folder,
    `UnsupportedModelError` for other weights than safetensors or an unknown family, `ScalingError` when the
    record belongs to another model, `LossyTargetError`, and `OutputError`.
    """
    folder = Path(source)
    config = read_json(folder / CONFIG_FILE)
    shards = model_shards(folder)
    changed = extended_config(config, scaling)
    model = language_model(config)
    losses = hf_losses(scaling) + model.window_losses(scaling) + model.composition_losses(scaling)
    refuse_losses(str(target), losses, allow_lossy=allow_lossy)
    with atomic_folder(target) as partial:
        for shard in shards:
            write_safetensors_metadata(shard, partial / shard.name, {SAFETENSORS_KEY: scaling.to_json()})
        for file in _other_files(folder, shards):
            _copy_file(file, partial / file.name)
        write_text(partial / CONFIG_FILE, json_text(changed))
        write_text(partial / RECORD_FILE, scaling.to_json())
        _extend_side_files(partial, scaling.max_position_embeddings)
        if add is not None:
            add(partial)
    return losses


def gguf_to_hf_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    dtype: str = "f32",
    allow_lossy: bool = False,
    add: Callable[[Path], None] | None = None,
) -> list[str]:
    """Write the folder `target`: the GGUF `source` dequantised to `dtype` (f32, f16, bf16), with `scaling`.

    Needs torch and memory for all weights at once, and room for a second copy of them beside `target`.
    Returns and raises as `write_hf_folder`; also raises `MissingDependencyError` without transformers.
    """
    header = read_gguf_header(source)
    check_dequantisable(dtype)
    own = window_losses(header, scaling) + composition_losses(header, scaling) + tokenizer_losses(header)
    refuse_losses(str(target), hf_losses(scaling) + own, allow_lossy=allow_lossy)
    parent = Path(target).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".dequantised-") as name:
        window = scaling.original_max_position_embeddings
        save_dequantised(header, Path(name), dtype=dtype, window=window)
        return own + write_hf_folder(name, target, scaling, allow_lossy=allow_lossy, add=add)


def model_shards(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, every shard that the index names among them.

    Raises `InputFileError` when one is missing, `UnsupportedModelError` when the weights have another form.
    """
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if (folder / INDEX).is_file():
        _check_index(folder, {path.name for path in found})
    if not found:
        others = sorted(path.name for path in folder.glob("*") if path.suffix in _OTHER_WEIGHTS)
        if others:
            raise UnsupportedModelError(
                f"{folder} holds its weights in {others[0]}, which may run code when opened; save it as safetensors"
            )
        raise InputFileError(f"{folder} has no .safetensors weights")
    return found


def _check_index(folder: Path, found: set[str]) -> None:
    shards = read_json(folder / INDEX).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise InputFileError(f"{folder / INDEX} has no weight_map")
    if missing := sorted(set(shards.values()) - found):
        raise InputFileError(f"{folder} has no {missing[0][:200]}, which its index names; download it again")


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


def _extend_side_files(folder: Path, window: int) -> None:
    """Let the tokenizer take the longer window, and generation use the cache that a trainer may have turned
    off.
    """
    tokenizer, generation = folder / "tokenizer_config.json", folder / "generation_config.json"
    if tokenizer.is_file():
        values = read_json(tokenizer)
        limit = values.get("model_max_length")
        if isinstance(limit, int) and limit < window:
            write_text(tokenizer, json_text({**values, "model_max_length": window}), overwrite=True)
    if generation.is_file():
        values = read_json(generation)
        if values.get("use_cache") is False:
            write_text(generation, json_text({**values, "use_cache": True}), overwrite=True)
