"""A short hash that tells one model from another without reading all of it: headers whole, weights by samples."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from longrope_export.errors import InputFileError, LongRopeError

if TYPE_CHECKING:
    from torch import nn

# Covers the header of every GGUF and safetensors file seen so far, a vocabulary of 256k included.
_HEAD_BYTES = 16 << 20
_BLOCKS, _BLOCK_BYTES = 64, 64 << 10


def fingerprint(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a model: for each file its name, size, first 16 MiB and 64 evenly spaced blocks of 64 KiB.

    `path` is a file, or a folder whose config.json, `*.safetensors` and `*.safetensors.index.json` are taken. Raises
    `InputFileError` when there is nothing to read.
    """
    place = Path(path)
    digest = hashlib.sha256()
    try:
        for file in _files(place):
            # A file's own name is not part of the model: a renamed GGUF is the same one.
            digest.update((file.name if place.is_dir() else "").encode() + b"\0")
            with file.open("rb") as opened:
                _sample(opened, digest)
    except OSError as error:
        raise InputFileError(f"{place} cannot be read: {error.strerror or error}") from None
    return digest.hexdigest()


def fingerprint_model(model: nn.Module) -> str:
    """Hex SHA-256 of a model in memory: names, shapes, dtypes and up to 4,096 evenly spaced values of every tensor.

    Raises `LongRopeError` for a model some of whose weights wait on the disk or in another memory.
    """
    import torch

    from longrope_export.placement import is_offloaded

    if is_offloaded(model):
        raise LongRopeError("weights of the model are not in memory; pass fingerprint=fingerprint(FOLDER) of its files")
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        values = tensor.detach().flatten()
        sample = values[:: max(1, values.numel() // 4096)].cpu().to(torch.float64)
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    files = [place / "config.json", *place.glob("*.safetensors"), *place.glob("*.safetensors.index.json")]
    found = sorted(file for file in files if file.is_file())
    if not found:
        raise InputFileError(f"{place} holds no model; name a model folder or a GGUF file")
    return found


def _sample(file: BinaryIO, digest: hashlib._Hash) -> None:
    size = file.seek(0, os.SEEK_END)
    digest.update(size.to_bytes(8, "little"))
    file.seek(0)
    digest.update(file.read(_HEAD_BYTES))
    rest = size - _HEAD_BYTES
    if rest <= 0:
        return
    for index in range(_BLOCKS):
        file.seek(_HEAD_BYTES + max(0, rest - _BLOCK_BYTES) * index // (_BLOCKS - 1))
        digest.update(file.read(_BLOCK_BYTES))
