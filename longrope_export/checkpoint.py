"""Opening model folders and GGUF files with transformers, without pickles and without code from folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.description import ModelDescription, describe
from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.families import FAMILIES, family_for_config
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.hf_scaling import scaling_from_config
from longrope_export.scaling import RopeScaling

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk that is safe to open, and the scaling that its files carry (None: none)."""

    path: Path
    gguf: bool
    scaling: RopeScaling | None

    def load(self, **from_pretrained: Any) -> Any:
        """The transformers model, in evaluation mode; `from_pretrained` goes to transformers.

        Raises `InputFileError` when transformers cannot read the weights.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, GgufConfig

        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True, **from_pretrained}
        place = self.path
        if self.gguf:
            options |= {"gguf_file": self.path.name, "quantization_config": GgufConfig(dequantize=True)}
            options.setdefault("dtype", "float32")
            place = self.path.parent
        else:
            options["use_safetensors"] = True
        try:
            return AutoModelForCausalLM.from_pretrained(str(place), **options)
        except (OSError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputFileError(f"transformers cannot load {self.path}: {reason}") from error


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Check a model folder or a GGUF file without reading its weights.

    Raises `InputFileError` for a missing path, a folder without config.json or with pickled weights only, or
    an adapter; `UnsupportedModelError` for a model type without a row in `FAMILIES`, or a GGUF architecture
    that transformers cannot import.
    """
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if place.is_file():
        return _gguf(place)
    raise InputFileError(f"{place} does not exist; give a model folder or a GGUF file on this machine")


def _folder(folder: Path) -> Checkpoint:
    if (folder / ADAPTER).exists():
        raise InputFileError(f"{folder} holds an adapter ({ADAPTER}); merge it into its base model first")
    config = read_json(folder / CONFIG)
    names = sorted(entry.name for entry in folder.iterdir())
    if not any(name.endswith(".safetensors") for name in names):
        pickled = next((name for name in names if name.endswith(_PICKLES)), None)
        if pickled:
            raise InputFileError(
                f"{folder / pickled} is a pickle, which can run code; convert the model to safetensors first"
            )
        raise InputFileError(f"{folder} has no .safetensors weights")
    family_for_config(config.get("model_type"))
    return Checkpoint(folder, gguf=False, scaling=scaling_from_config(config))


def _gguf(path: Path) -> Checkpoint:
    description = describe(path)
    _check_importable(path, description.architecture)
    return Checkpoint(path, gguf=True, scaling=_carried(description))


def _check_importable(path: Path, architecture: str) -> None:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    known = {name for family in FAMILIES.values() for name in family.gguf_architectures}
    importable = sorted(known & set(GGUF_SUPPORTED_ARCHITECTURES))
    if architecture not in importable:
        raise UnsupportedModelError(
            f"{path} has the architecture {architecture[:80]!r}, which transformers cannot import "
            f"into a family known here ({', '.join(importable)}); give the original model folder instead"
        )


def _carried(description: ModelDescription) -> RopeScaling | None:
    """The record in a GGUF, else what llama.cpp applies at every length; transformers drops both silently."""
    if description.scaling is not None or description.existing_factors is None:
        return description.scaling
    attention = description.existing_attention_factor
    return RopeScaling(
        rope_theta=description.rope_theta,
        rotary_dim=description.rotary_dim,
        original_max_position_embeddings=description.window,
        max_position_embeddings=description.window,
        long_factor=description.existing_factors,
        short_factor=description.existing_factors,
        long_attention_factor=attention,
        short_attention_factor=attention,
        provenance={"source": f"GGUF {description.rope_type}"},
    )
