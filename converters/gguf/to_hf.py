"""A GGUF file as a transformers folder: dequantised weights, its tokenizer, and a `RopeScaling`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from longrope_export.converters.gguf.checks import composition_losses, window_losses
from longrope_export.converters.gguf.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json
from longrope_export.converters.hf_folder import json_text, write_hf_folder
from longrope_export.converters.lossy import hf_losses, refuse_losses

from longrope_export.errors import InputFileError, MissingDependencyError, UnsupportedModelError
from longrope_export.files import write_text
from longrope_export.formats.gguf_header import GgufHeader, read_gguf_header
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.records import CONFIG_FILE
from longrope_export.scaling import RopeScaling

TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def gguf_to_hf_folder(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    dtype: str = "f32",
    allow_lossy: bool = False,
    add: Callable[[Path], None] | None = None,
) -> list[str]:
    """Write the folder `target`: the weights of the GGUF `source` dequantised to `dtype` (f32, f16, bf16),
    with `scaling`.

    transformers reads the weights (it needs torch, and memory for all of them). Its tokenizer import forgets
    the pre-tokenizer, which is put right here. `add` and the errors are as in `write_hf_folder`; also raises
    `MissingDependencyError` without transformers.
    """
    header = read_gguf_header(source)
    if dtype not in TORCH_DTYPES:
        raise UnsupportedModelError(
            f"the dtype {dtype!r} is no dtype of an HF folder; choose {', '.join(TORCH_DTYPES)}"
        )
    own = window_losses(header, scaling) + composition_losses(header, scaling) + _tokenizer_losses(header)
    refuse_losses(str(target), hf_losses(scaling) + own, allow_lossy=allow_lossy)
    parent = Path(target).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=".dequantised-") as name:
        folder = Path(name)
        _save_model(header.path, folder, dtype)
        _correct_tokenizer(header, folder)
        _set_window(folder, scaling.original_max_position_embeddings)
        return own + write_hf_folder(folder, target, scaling, allow_lossy=allow_lossy, add=add)


def _save_model(source: Path, folder: Path, dtype: str) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError:
        raise MissingDependencyError(
            "an HF folder from a GGUF needs: pip install 'longrope-export[model]'"
        ) from None
    where: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=getattr(torch, TORCH_DTYPES[dtype]), quantization_config=config
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _tokenizer_losses(header: GgufHeader) -> list[str]:
    name = header.get("tokenizer.ggml.pre", "default")
    if header.get("tokenizer.ggml.model") != "gpt2" or name in PRE_TOKENIZERS:
        return []
    return [f"the pre-tokenizer {name!r} is not known here, so numbers and spaces may be split differently"]


def _correct_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Put the pre-tokenizer that `tokenizer.ggml.pre` names into tokenizer.json; transformers always writes
    GPT-2's.
    """
    path, row = folder / "tokenizer.json", PRE_TOKENIZERS.get(header.get("tokenizer.ggml.pre", ""))
    if header.get("tokenizer.ggml.model") != "gpt2" or row is None or not path.is_file():
        return
    values = read_json(path)
    model = values.get("model")
    if not isinstance(model, dict):
        raise InputFileError(f"{header.path}: its tokenizer cannot be saved")
    model["ignore_merges"] = row.ignore_merges
    values["pre_tokenizer"] = pre_tokenizer_json(row.name)
    write_text(path, json_text(values), overwrite=True)


def _set_window(folder: Path, window: int) -> None:
    """A patched GGUF states the extended length; transformers takes it for the model's own."""
    config = read_json(folder / CONFIG_FILE)
    write_text(folder / CONFIG_FILE, json_text({**config, "max_position_embeddings": window}), overwrite=True)
