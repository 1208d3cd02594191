"""`describe`: what a model folder or GGUF file says about its RoPE, without reading weights."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.families import Family
from longrope_export.formats.gguf_header import MAGIC
from longrope_export.gguf_architectures import GgufArchitecture
from longrope_export.scaling import RopeScaling


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """A model's RoPE and sizes, read from headers only.

    `window` is the length that the file declares now; `rope_parameters` its present scaling under
    transformers' names (flat, of the full-attention layers). `existing_factors` (divisors, float32
    [rotary_dim // 2]) and `existing_attention_factor` are what applies now to sequences inside the window,
    None and 1 for plain RoPE. `scaling` is the longrope record, when the file carries one. `honours` maps a
    runtime to what it does with longrope factors for this model.
    """

    kind: str
    path: str
    architecture: str
    family: Family | None
    gguf: GgufArchitecture | None
    head_dim: int
    rotary_dim: int
    rope_theta: float
    window: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int
    rope_type: str
    rope_parameters: dict[str, Any]
    scaling: RopeScaling | None
    existing_factors: tuple[float, ...] | None
    existing_attention_factor: float
    layer_types: tuple[str, ...]
    sliding_window: int | None
    parameters: int
    tensor_bytes: dict[str, int]
    honours: dict[str, str]
    warnings: tuple[str, ...]

    @property
    def original_window(self) -> int:
        """L: the length where the present scaling switches to long factors, or the declared window without
        one.
        """
        return self.window if self.scaling is None else self.scaling.original_max_position_embeddings

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: names instead of rows, the record's own form for `scaling`."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["family"] = None if self.family is None else self.family.name
        values["gguf"] = None if self.gguf is None else self.gguf.name
        values["scaling"] = None if self.scaling is None else self.scaling.to_dict()
        values["original_window"] = self.original_window
        values["existing_factors"] = None if self.existing_factors is None else list(self.existing_factors)
        values["layer_types"], values["warnings"] = list(self.layer_types), list(self.warnings)
        return values


def describe(path: str | os.PathLike[str]) -> ModelDescription:
    """Describe the model folder (config.json, safetensors) or GGUF file at `path`.

    Reads headers only (and factor tensors, which are d/2 values). Raises `InputFileError` when it is
    missing or malformed, `UnsupportedModelError` when its architecture is not known here or does not rotate.
    Of a split GGUF any shard may be named; the others are read too.
    """
    source = Path(path)
    if source.is_dir() or source.name == "config.json":
        from longrope_export.formats.hf_description import describe_folder

        return describe_folder(source if source.is_dir() else source.parent)
    if not source.is_file():
        raise InputFileError(
            f"{source} does not exist; name a model folder or a .gguf file (`hf download "
            "OWNER/NAME --local-dir DIR` fetches one)"
        )
    if source.suffix.lower() != ".gguf" and not _is_gguf(source):
        raise InputFileError(f"{source} is neither a GGUF file nor a model folder with config.json")
    from longrope_export.formats.gguf_description import describe_gguf

    return describe_gguf(source)


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from error
