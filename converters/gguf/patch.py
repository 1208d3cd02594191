"""Embedding factors in an existing GGUF file: a new header in front of the same tensor bytes.

Untouched keys are copied as the bytes they are, so a vocabulary of any size costs nothing; tensor data is
copied in large blocks and never interpreted.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from longrope_export.converters.copying import copy_range
from longrope_export.converters.gguf.checks import check_patchable
from longrope_export.converters.gguf.encode import encode_entry, encode_head, encode_tensor_info
from longrope_export.converters.gguf.scaling_keys import SCALING_TENSORS, is_removed, scaling_entries
from longrope_export.errors import OutputError
from longrope_export.files import atomic_output
from longrope_export.formats.gguf_header import GgufHeader, TensorInfo, align, read_gguf_header, read_range
from longrope_export.formats.gguf_scaling import LONG_TENSOR, SHORT_TENSOR
from longrope_export.scaling import RopeScaling

_F32 = 0


def patch_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling,
    *,
    allow_lossy: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write `target`: the GGUF file `source` with `scaling` embedded and every weight as it was.

    Returns what the file cannot express, which is refused unless `allow_lossy`. Patching is idempotent, and
    the result does not depend on a scaling that `source` carried before. Raises `InputFileError` for a
    damaged or split file, `UnsupportedModelError` when llama.cpp would not apply the factors, `ScalingError`
    when the record belongs to another model, `LossyTargetError`, and `OutputError`.
    """
    _check_different(Path(source), Path(target))
    header = read_gguf_header(source)
    lossy = check_patchable(header, scaling, allow_lossy=allow_lossy)
    kept = [info for info in header.tensors if info.name not in SCALING_TENSORS]
    with header.path.open("rb", buffering=0) as original, atomic_output(target, overwrite=overwrite) as file:
        file.write(_header_bytes(header, kept, scaling))
        _copy_data(header, kept, original, file)
        file.write(_factor_bytes(header.alignment, scaling))
    return lossy


def _check_different(source: Path, target: Path) -> None:
    if source.exists() and target.exists() and source.samefile(target):
        raise OutputError(f"{target} is the source itself; name another output")


def _header_bytes(header: GgufHeader, kept: list[TensorInfo], scaling: RopeScaling) -> bytes:
    entries, count = _entry_bytes(header, scaling)
    infos = _info_bytes(header, kept, scaling)
    raw = encode_head(header.version, len(kept) + 2, count) + entries + infos
    return raw.ljust(align(len(raw), header.alignment), b"\0")


def _entry_bytes(header: GgufHeader, scaling: RopeScaling) -> tuple[bytes, int]:
    """Bytes and number of the key-value pairs: untouched ones verbatim, ours behind them in a fixed order."""
    architecture = str(header.get("general.architecture"))
    ours = scaling_entries(architecture, scaling)
    raw = read_range(header.path, header.kv_start, header.kv_end)
    untouched = [
        raw[entry.start - header.kv_start : entry.end - header.kv_start]
        for key, entry in header.metadata.items()
        if key not in ours and not is_removed(architecture, key)
    ]
    added = [encode_entry(key, value) for key, value in ours.items()]
    return b"".join(untouched + added), len(untouched) + len(added)


def _info_bytes(header: GgufHeader, kept: list[TensorInfo], scaling: RopeScaling) -> bytes:
    """The tensor table with contiguous offsets, which llama.cpp demands, and the two factor tensors last."""
    rows = []
    offset = 0
    for info in kept:
        rows.append(encode_tensor_info(info.name, info.shape, info.ggml_type, offset))
        offset += align(info.size, header.alignment)
    pairs = scaling.rotary_dim // 2
    for name in (LONG_TENSOR, SHORT_TENSOR):
        rows.append(encode_tensor_info(name, (pairs,), _F32, offset))
        offset += align(4 * pairs, header.alignment)
    return b"".join(rows)


def _copy_data(header: GgufHeader, kept: list[TensorInfo], original: BinaryIO, file: BinaryIO) -> None:
    for start, length in _runs(header, kept):
        copy_range(
            original,
            file,
            header.data_start + start,
            min(length, header.file_size - header.data_start - start),
        )
        file.write(bytes(align(file.tell(), header.alignment) - file.tell()))


def _runs(header: GgufHeader, kept: list[TensorInfo]) -> list[tuple[int, int]]:
    """Offsets and padded lengths of what is copied, neighbours joined."""
    runs: list[tuple[int, int]] = []
    for info in kept:
        length = align(info.size, header.alignment)
        if runs and sum(runs[-1]) == info.offset:
            runs[-1] = (runs[-1][0], runs[-1][1] + length)
        else:
            runs.append((info.offset, length))
    return runs


def _factor_bytes(alignment: int, scaling: RopeScaling) -> bytes:
    blocks = []
    for factors in (scaling.long_factor, scaling.short_factor):
        raw = struct.pack(f"<{len(factors)}f", *factors)
        blocks.append(raw.ljust(align(len(raw), alignment), b"\0"))
    return b"".join(blocks)
