"""Copies by the system, and blocks shared with the source where the file system can."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling
from longrope_export.converters import copying
from longrope_export.converters.copying import can_share, copy_range
from longrope_export.converters.gguf import rewrite
from longrope_export.converters.gguf.patch import patch_gguf, plan_patch
from longrope_export.converters.gguf.rewrite import FILLER_KEY
from longrope_export.errors import InputFileError
from longrope_export.files import atomic_output
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_tensors import read_raw
from longrope_export.formats.records import read_scaling

Record = Callable[..., RopeScaling]
Build = Callable[..., Path]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").write_bytes(np.random.default_rng(0).bytes(3_000_001))
    return tmp_path / "source"


def copied(source: Path, target: Path, start: int, length: int) -> bytes:
    with source.open("rb", buffering=0) as original, atomic_output(target, overwrite=True) as file:
        file.write(b"head")
        copy_range(original, file, start, length)
        file.write(b"tail")
    return target.read_bytes()


@pytest.mark.parametrize("step", [1 << 20, 32 << 20])
@pytest.mark.parametrize("refusal", [None, errno.EXDEV, errno.EINVAL, "absent", "half"])
def test_every_way_of_copying_gives_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: Any, step: int
) -> None:
    raw, call, seen = source.read_bytes(), os.copy_file_range, []

    def refusing(*arguments: Any) -> int:
        seen.append(arguments)
        if isinstance(refusal, int) or (refusal == "half" and len(seen) > 1):
            raise OSError(refusal if isinstance(refusal, int) else errno.EINVAL, "no")
        return call(*arguments[:2], min(arguments[2], 700_000), *arguments[3:])

    monkeypatch.setattr(copying, "_STEP", step)
    monkeypatch.setattr(os, "copy_file_range", refusing)
    if refusal == "absent":
        monkeypatch.delattr(os, "copy_file_range")
    for start, length in ((0, len(raw)), (17, 2_500_000), (5, 0)):
        assert copied(source, tmp_path / "target", start, length) == b"head" + raw[start : start + length] + b"tail"
    assert bool(seen) == (refusal != "absent")


def test_a_source_that_ends_early_and_errors_of_the_disk(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputFileError, match="ended 1 bytes early"):
        copied(source, tmp_path / "target", 0, 3_000_002)
    assert not (tmp_path / "target").exists()

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "copy_file_range", full)
    with pytest.raises(Exception, match="the disk is full"):
        copied(source, tmp_path / "target", 0, 100)


@pytest.fixture
def large(gguf_file: Build) -> Path:
    values = np.random.default_rng(1).standard_normal((700, 700))
    return gguf_file(tensors={"rope_freqs.weight": np.ones(8), "blk.0.ffn_up.weight": values})


def test_a_copy_that_can_share_blocks_has_its_data_where_they_can_be_shared(
    large: Path, record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest run of tensors stands at the same remainder of a block; nothing else differs from another copy."""
    monkeypatch.setattr(rewrite, "can_share", lambda source, folder: True)
    shared, again, plain = (tmp_path / name for name in ("shared.gguf", "again.gguf", "plain.gguf"))
    planned, _ = plan_patch(large, shared, record())
    patch_gguf(large, shared, record())
    assert planned == shared.stat().st_size
    before, after = read_gguf_header(large), read_gguf_header(shared)
    places = []
    for header in (before, after):
        info = header.tensor("blk.0.ffn_up.weight")
        assert info is not None
        places.append(header.data_start + info.offset)
    assert places[0] % 4096 == places[1] % 4096
    assert after.infos_end == after.data_start, "llama.cpp allows no gap in front of the data"
    assert set(after.read_array(FILLER_KEY)) <= {0}
    patch_gguf(shared, again, record())
    assert again.read_bytes() == shared.read_bytes()
    monkeypatch.setattr(rewrite, "can_share", lambda source, folder: False)
    patch_gguf(shared, plain, record())
    other = read_gguf_header(plain)
    assert {*after.metadata} - {*other.metadata} == {FILLER_KEY}
    assert [(info.name, read_raw(after, info.name)) for info in after.tensors] == [
        (info.name, read_raw(other, info.name)) for info in other.tensors
    ]
    assert read_scaling(shared) == record()


def test_small_files_get_no_filler(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    patch_gguf(gguf_file(), tmp_path / "new.gguf", record())
    assert FILLER_KEY not in read_gguf_header(tmp_path / "new.gguf").metadata


def test_blocks_are_shared_where_the_file_system_can(large: Path, record: Record, tmp_path: Path) -> None:
    """On XFS and Btrfs; elsewhere the copy is a plain one without a filler."""
    patch_gguf(large, tmp_path / "new.gguf", record())
    keys = read_gguf_header(tmp_path / "new.gguf").metadata
    shares = can_share(large, tmp_path)
    assert (FILLER_KEY in keys) == shares
    if shares:
        assert shared_bytes(tmp_path / "new.gguf") > 0.9 * 4 * 700 * 700


def shared_bytes(path: Path) -> int:
    """Bytes in extents that the system calls shared (FIEMAP)."""
    count, head = 512, struct.Struct("=QQIIII")
    buffer = bytearray(head.pack(0, (1 << 64) - 1, 1, 0, count, 0) + bytes(56 * count))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        fcntl.ioctl(file.fileno(), 0xC020660B, buffer)
    found = head.unpack_from(buffer)[3]
    extents = [struct.unpack_from("=QQQQQIIII", buffer, head.size + 56 * index) for index in range(found)]
    return sum(extent[2] for extent in extents if extent[5] & 0x2000)
