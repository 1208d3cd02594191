"""The disk fills up while a command writes: one clear line, exit 1, and nothing half-written is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from full_disk import Filled, can_mount, on_small_disk

from longrope_export import RopeScaling
from longrope_export.converters.gguf.convert import convert_to_gguf

Build = Callable[..., Path]
Record = Callable[..., RopeScaling]
KIB = 1024


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def refused(done: Filled, name: str) -> None:
    """One line that names the output and the reason, exit code 1, and an empty disk."""
    assert (done.code, len(done.errors)) == (1, 1), done
    reasons = ["the disk is full"] if can_mount() else ["the disk is full", "File too large"]
    assert name in done.errors[0]
    assert any(reason in done.errors[0] for reason in reasons), done.errors
    assert done.left == []


@pytest.mark.parametrize("size", [4 * KIB, 512 * KIB])
def test_patch(gguf_file: Build, record: Record, tmp_path: Path, disk: Path, size: int) -> None:
    source = gguf_file(tensors={"blk.0.ffn_up.weight": np.zeros((500, 500))})
    (tmp_path / "longrope.json").write_text(record().to_json())
    arguments = ("patch", source, "--scaling", tmp_path / "longrope.json", "--out", disk / "new.gguf")
    refused(on_small_disk(disk, size, *arguments), "new.gguf")
    assert on_small_disk(disk, 4 * KIB * KIB, *arguments).left == ["new.gguf"], "it was the room that was missing"


@pytest.mark.parametrize("share", [0.3, 1.2, 1.48])
def test_export_of_a_folder(small_llama: Path, record: Record, tmp_path: Path, disk: Path, share: float) -> None:
    """Full in the copied weights, in the GGUF beside them, and in the last small files."""
    (tmp_path / "longrope.json").write_text(record(32).to_json())
    weights = (small_llama / "model.safetensors").stat().st_size
    arguments = ("export", small_llama, "--scaling", tmp_path / "longrope.json", "--out", disk / "new")
    room = share if can_mount() else 0.3  # a limit for each file, not for all together
    refused(on_small_disk(disk, int(room * weights), *arguments), "new")


def test_export_of_a_gguf(small_llama: Path, record: Record, tmp_path: Path, disk: Path) -> None:
    """transformers itself writes the dequantised weights."""
    (tmp_path / "longrope.json").write_text(record(32).to_json())
    convert_to_gguf(small_llama, tmp_path / "small.gguf")
    arguments = ("export", tmp_path / "small.gguf", "--scaling", tmp_path / "longrope.json", "--out", disk / "new")
    refused(on_small_disk(disk, 256 * KIB, *arguments), "new")
