"""Fingerprints tell models apart and do not depend on where a model lies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from longrope_export.errors import InputFileError
from longrope_export.fingerprint import _BLOCK_BYTES, _BLOCKS, _HEAD_BYTES, fingerprint, fingerprint_model


def test_a_copied_folder_and_a_renamed_file_are_the_same_model(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "copy")
    (tmp_path / "copy" / "README.md").write_text("a card is not the model")
    assert fingerprint(tmp_path / "copy") == fingerprint(tiny_llama)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF and the rest")
    assert fingerprint(tmp_path / "a.gguf") == fingerprint(tmp_path / "b.gguf")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_changed_byte_in_a_small_model_is_another_one(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tiny_llama, tmp_path / "copy")
    data = bytearray((tmp_path / "copy" / name).read_bytes())
    data[-2] ^= 1
    (tmp_path / "copy" / name).write_bytes(data)
    assert fingerprint(tmp_path / "copy") != fingerprint(tiny_llama)


def test_a_large_file_is_known_by_its_head_its_size_and_samples_to_its_end(tmp_path: Path) -> None:
    size = _HEAD_BYTES + 3 * _BLOCKS * _BLOCK_BYTES
    prints = []
    for offset in (None, 0, _HEAD_BYTES - 1, _HEAD_BYTES, size - 1):
        path = tmp_path / "model.gguf"
        with path.open("wb") as file:
            file.truncate(size)
            if offset is not None:
                file.seek(offset)
                file.write(b"x")
        prints.append(fingerprint(path))
    with path.open("r+b") as file:
        file.truncate(size + 1)
    prints.append(fingerprint(path))
    assert len(set(prints)) == 6


def test_a_model_in_memory_is_known_by_its_values(tiny: Any) -> None:
    before = fingerprint_model(tiny.model)
    assert fingerprint_model(tiny.model) == before
    weight = tiny.model.model.norm.weight
    with torch.no_grad():
        weight[3] += 1.0
    changed = fingerprint_model(tiny.model)
    with torch.no_grad():
        weight[3] -= 1.0
    assert changed != before == fingerprint_model(tiny.model)


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputFileError):
            fingerprint(path)
