"""Opening model folders and GGUF files with transformers, without pickles and without code from folders."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.description import ModelDescription, describe
from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.families import FAMILIES
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_shards import refuse_split
from longrope_export.gguf_import import load_gguf_model, needs_own_import
from longrope_export.scaling import RopeScaling

ADAPTER = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk that is safe to open, as its headers describe it."""

    path: Path
    description: ModelDescription

    @property
    def scaling(self) -> RopeScaling | None:
        """The record that the files carry, or None.

        For a GGUF without one it is what llama.cpp applies at every length (`rope_freqs`, linear, YaRN), because
        transformers drops either without a word.
        """
        found = self.description
        if found.scaling is not None or found.kind == "hf" or found.existing_factors is None:
            return found.scaling
        return RopeScaling(
            rope_theta=found.rope_theta,
            rotary_dim=found.rotary_dim,
            original_max_position_embeddings=found.window,
            max_position_embeddings=found.window,
            long_factor=found.existing_factors,
            short_factor=found.existing_factors,
            long_attention_factor=found.existing_attention_factor,
            short_attention_factor=found.existing_attention_factor,
            provenance={"source": f"GGUF {found.rope_type}"},
        )

    def load(self, **from_pretrained: Any) -> Any:
        """The transformers model, in evaluation mode; `from_pretrained` goes to transformers.

        Raises `InputFileError` when transformers cannot read the weights, or some of them are not there.
        """
        from safetensors import SafetensorError
        from transformers import AutoModelForCausalLM, GgufConfig

        if self.description.kind == "gguf":
            header = read_gguf_header(self.path)
            if needs_own_import(header):
                return load_gguf_model(header, self.description, **from_pretrained)
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True, **from_pretrained}
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # reported below, by name
        place = self.path
        if self.description.kind == "gguf":
            _refuse_disk(self.path, options.get("device_map"))
            options |= {"gguf_file": self.path.name, "quantization_config": GgufConfig(dequantize=True)}
            options.setdefault("dtype", "float32")
            place = self.path.parent
        else:
            options["use_safetensors"] = True
        try:
            model, report = AutoModelForCausalLM.from_pretrained(str(place), **options)
        except (OSError, SafetensorError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputFileError(f"transformers cannot load {self.path}: {reason}") from error
        _check_complete(self.path, report)
        return model


def _refuse_disk(gguf: Path, device_map: Any) -> None:
    if isinstance(device_map, dict) and "disk" in device_map.values():
        raise InputFileError(
            f"{gguf} is a GGUF, whose weights are computed when it is read and cannot stay on the disk: "
            "give the original model folder, or a device map without disk"
        )


def _check_complete(path: Path, report: dict[str, Any]) -> None:
    # transformers fills what is missing with random numbers.
    wrong = sorted(entry[0] if isinstance(entry, tuple) else entry for entry in report["mismatched_keys"])
    for names, problem in (
        (sorted(report["missing_keys"]), "missing"),
        (wrong, "of another shape than the config says"),
    ):
        if names:
            raise InputFileError(f"{path}: {len(names)} weights are {problem}, the first is {names[0]}")


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
    names = sorted(entry.name for entry in folder.iterdir())
    pickled = next((name for name in names if name.endswith(_PICKLES)), None)
    if not any(name.endswith(".safetensors") for name in names) and pickled:
        raise InputFileError(
            f"{folder / pickled} is a pickle, which can run code; convert the model to safetensors first"
        )
    description = describe(folder)
    if not any(name.endswith(".safetensors") for name in names):
        raise InputFileError(f"{folder} has no .safetensors weights")
    return Checkpoint(folder, description)


def _gguf(path: Path) -> Checkpoint:
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    refuse_split(path)
    description = describe(path)
    known = {name for family in FAMILIES.values() for name in family.gguf_architectures}
    importable = sorted(known & set(GGUF_SUPPORTED_ARCHITECTURES))
    if description.architecture not in importable and not needs_own_import(read_gguf_header(path)):
        raise UnsupportedModelError(
            f"{path} has the architecture {description.architecture[:80]!r}, which transformers cannot import "
            f"into a family known here ({', '.join(importable)}); give the original model folder instead"
        )
    return Checkpoint(path, description)
