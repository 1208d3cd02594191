"""GGUF files made wrong on purpose: the small changes that several tests of the doctor make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longrope_export.converters.gguf.rewrite import GgufChanges, rewrite_gguf
from longrope_export.formats.gguf_header import read_gguf_header


def change(path: Path, **changes: Any) -> Path:
    """`path` with GgufChanges' fields applied."""
    rewrite_gguf(read_gguf_header(path), path, GgufChanges(**changes), overwrite=True)
    return path


def renamed(path: Path, architecture: str, **keys: Any) -> Path:
    """`path` under another architecture's name, with further keys of it."""
    header = read_gguf_header(path)
    old = [key for key in header.metadata if key.startswith("llama.")]
    entries = {f"{architecture}.{key.removeprefix('llama.')}": header.get(key) for key in old}
    entries |= {f"{architecture}.{key.replace('__', '.')}": value for key, value in keys.items()}
    return change(path, entries={"general.architecture": architecture, **entries}, removed=frozenset(old))
