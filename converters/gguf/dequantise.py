"""A GGUF file's dequantised weights and its tokenizer as a plain transformers folder."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from longrope_export.checkpoint import open_checkpoint
from longrope_export.converters.gguf.rewrite import GgufChanges, rewrite_gguf
from longrope_export.converters.hf_config import json_text
from longrope_export.errors import InputFileError, MissingDependencyError, UnsupportedModelError
from longrope_export.files import write_text
from longrope_export.formats.gguf_header import GgufHeader
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json
from longrope_export.formats.records import CONFIG_FILE
from longrope_export.gguf_import import needs_own_import

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
    _save_model(header, folder, dtype)
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


def _save_model(header: GgufHeader, folder: Path, dtype: str) -> None:
    try:
        import torch
        from safetensors import SafetensorError
        from transformers import AutoTokenizer
    except ImportError:
        raise MissingDependencyError(
            "an HF folder from a GGUF needs transformers: pip install 'longrope-export[model]'"
        ) from None
    model = open_checkpoint(header.path).load(dtype=getattr(torch, TORCH_DTYPES[dtype]))
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # it names the system's error only in its text
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
    with tempfile.TemporaryDirectory() as name:
        where = _tokenizer_source(header, Path(name)).absolute()
        tokenizer = AutoTokenizer.from_pretrained(where.parent, gguf_file=where.name, local_files_only=True)
    tokenizer.save_pretrained(folder)


def _tokenizer_source(header: GgufHeader, folder: Path) -> Path:
    """The file, or its keys alone under a name that transformers reads tokenizers from."""
    if not needs_own_import(header):
        return header.path
    changes = GgufChanges(
        entries={"general.architecture": "llama"}, dropped=frozenset(info.name for info in header.tensors)
    )
    rewrite_gguf(header, folder / "tokenizer.gguf", changes)
    return folder / "tokenizer.gguf"


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
