"""Model folders and GGUF files of a few kilobytes that `describe` reads: just enough keys, changed at will."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType, GGUFWriter

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
KEYS: dict[str, Any] = {
    "context_length": 8192,
    "embedding_length": 32,
    "block_count": 4,
    "attention.head_count": 2,
    "attention.head_count_kv": 1,
    "rope.dimension_count": 16,
    "rope.freq_base": 500000.0,
    "vocab_size": 97,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
_KINDS = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
}
Folder = Callable[..., Path]
File = Callable[..., Path]


def write_folder(path: Path, config: dict[str, Any] | str | None = None, **changes: Any) -> Path:
    """A config.json in `path`: `CONFIG` with `changes`, or another object or text."""
    values = {**CONFIG, **changes}
    text = config if isinstance(config, str) else json.dumps(config or values)
    (path / "config.json").write_text(text)
    return path


def write_gguf(
    path: Path,
    keys: dict[str, Any] = KEYS,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    **more: Any,
) -> Path:
    """The GGUF file `path` with an architecture's `keys`, further keys (`__` for `.`), and one weight beside `tensors`."""
    writer = GGUFWriter(path, architecture)
    for name, value in keys.items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{name}", value)
        else:
            writer.add_key_value(f"{architecture}.{name}", value, _KINDS[type(value)])
    for name, value in more.items():
        writer.add_key_value(name.replace("__", "."), value, _KINDS[type(value)])
    for name, values in {"token_embd.weight": np.zeros((97, 32), np.float32), **(tensors or {})}.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
