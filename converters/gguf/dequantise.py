"""A GGUF file's dequantised weights and its tokenizer as a plain transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longrope_export.converters.hf_config import json_text
from longrope_export.errors import InputFileError, MissingDependencyError, UnsupportedModelError
from longrope_export.files import write_text
from longrope_export.formats.gguf_header import GgufHeader
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json
from longrope_export.formats.records import CONFIG_FILE

TORCH_DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def check_dequantisable(dtype: str) -> None:
    """Raise `UnsupportedModelError` for a dtype that an HF folder cannot have here."""
    if dtype not in TORCH_DTYPES:
        raise UnsupportedModelError(f"an HF folder cannot be {dtype!r}; choose one of {', '.join(TORCH_DTYPES)}")


def save_dequantised(header: GgufHeader, folder: Path, *, dtype: str, window: int) -> None:
    """Write the model and its tokenizer into `folder`, with a window of `window` tokens and no rope scaling.

    transformers reads the weights: it drops every scaling that the file carries, and takes a patched file's
    extended length for the model's own. Raises `MissingDependencyError` without transformers.
    """
    _save_model(header.path, folder, dtype)
    _correct_tokenizer(header, folder)
    config = read_json(folder / CONFIG_FILE)
    text = json_text({**config, "max_position_embeddings": window})
    write_text(folder / CONFIG_FILE, text, overwrite=True)


def tokenizer_losses(header: GgufHeader) -> list[str]:
    """One sentence when transformers would split text otherwise than llama.cpp does."""
    name = header.get("tokenizer.ggml.pre", "default")
    if header.get("tokenizer.ggml.model") != "gpt2" or name in PRE_TOKENIZERS:
        return []
    return [f"the pre-tokenizer {name!r} is not known here, so numbers and spaces may be split differently"]


def _save_model(source: Path, folder: Path, dtype: str) -> None:
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError:
        raise MissingDependencyError(
            "an HF folder from a GGUF needs transformers: pip install 'longrope-export[model]'"
        ) from None
    where: dict[str, Any] = {
        "pretrained_model_name_or_path": source.absolute().parent,
        "gguf_file": source.name,
        "local_files_only": True,
    }
    model = AutoModelForCausalLM.from_pretrained(
        **where,
        dtype=getattr(torch, TORCH_DTYPES[dtype]),
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def _correct_tokenizer(header: GgufHeader, folder: Path) -> None:
    """Put the pre-tokenizer that `tokenizer.ggml.pre` names into tokenizer.json.

    transformers writes GPT-2's whatever the file says, so that 123 stays one piece where the model learned
    digits.
    """
    path, row = folder / "tokenizer.json", PRE_TOKENIZERS.get(str(header.get("tokenizer.ggml.pre")))
    if header.get("tokenizer.ggml.model") != "gpt2" or row is None or not path.is_file():
        return
    values = read_json(path)
    model = values.get("model")
    if not isinstance(model, dict):
        raise InputFileError(f"{header.path}: its tokenizer cannot be saved")
    model["ignore_merges"] = row.ignore_merges
    values["pre_tokenizer"] = pre_tokenizer_json(row.name)
    write_text(path, json_text(values), overwrite=True)
