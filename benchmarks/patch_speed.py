"""Time and memory of `longrope patch` against `cp` plus a sync of the copy, on a GGUF of random bytes.

    python benchmarks/patch_speed.py [--gigabytes 2.2] [--rounds 5] [--folder .]

Each round runs cp and patch in turn (order alternating), both on a source in the page cache; the median start-up
(`longrope --help`) is subtracted from patch. Prints the median of the rounds' ratios and the child's peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine, run_child

from longrope_export.scaling import RopeScaling

VOCABULARY = 151_936
THETA = 1e6
SHAPE = (4096, 4096)
LONGROPE = [sys.executable, "-c", "from longrope_export.cli.main import main; main()"]


def main() -> None:
    """Parse the options, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_model(options.write, options.gigabytes)
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="patch-speed-") as folder:
        print(json.dumps(measure(Path(folder), options.gigabytes, options.rounds), indent=2))


def measure(folder: Path, gigabytes: float, rounds: int) -> dict[str, object]:
    """Medians over `rounds` rounds after one that is not counted."""
    source, record = folder / "source.gguf", folder / "longrope.json"
    # in a child: the peak memory of later children counts what this process held when they were forked
    run_child([sys.executable, __file__, "--write", str(source), "--gigabytes", str(gigabytes)])
    record.write_text(make_record().to_json())
    copies, patches, starts, peaks = [], [], [], []
    for index in range(rounds + 1):
        for step in ("copy", "patch") if index % 2 else ("patch", "copy"):
            if step == "copy":
                copies.append(time_copy(source, folder / "copy.gguf"))
            else:
                seconds, peak = time_patch(source, record, folder / "new.gguf")
                patches.append(seconds)
                peaks.append(peak)
        starts.append(run_child([*LONGROPE, "--help"])[1])
    start = statistics.median(starts)
    return {
        "machine": machine(),
        "gigabytes": round(source.stat().st_size / 1e9, 3),
        "copy_seconds": [round(seconds, 2) for seconds in copies[1:]],
        "patch_seconds": [round(seconds, 2) for seconds in patches[1:]],
        "start_seconds": round(start, 2),
        "ratio": round(statistics.median((p - start) / c for p, c in zip(patches[1:], copies[1:], strict=True)), 3),
        "peak_megabytes": round(max(peaks) / 1e6, 1),
    }


def write_model(path: Path, gigabytes: float, *, preallocated: bool = False) -> None:
    """A llama GGUF with F16 tensors of random bytes (or preallocated blocks) and a vocabulary of Qwen2's size."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_rope_dimension_count(128)
    writer.add_rope_freq_base(THETA)
    writer.add_token_list([f"token{index}" for index in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges([f"left{index} right{index}" for index in range(VOCABULARY)])
    size = 2 * SHAPE[0] * SHAPE[1]
    count = round(gigabytes * 1e9 / size)
    for index in range(count):
        writer.add_tensor_info(f"blk.{index}.ffn_up.weight", SHAPE, np.dtype(np.float16), size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for _ in range(0 if preallocated else count):
        writer.write_tensor_data(np.frombuffer(generator.bytes(size), np.float16).reshape(SHAPE))
    writer.close()
    if preallocated:
        allocate(path, count * size)
    os.sync()


def allocate(path: Path, size: int) -> None:
    """Give the file `size` bytes of tensor data behind its header: real blocks, but unwritten."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = -(-end // 32) * 32
        os.posix_fallocate(file.fileno(), end, start + size - end)


def make_record() -> RopeScaling:
    """A record for `write_model`'s file."""
    return RopeScaling(
        rope_theta=THETA,
        rotary_dim=128,
        original_max_position_embeddings=8192,
        max_position_embeddings=32768,
        long_factor=tuple(1 + 3 * index / 63 for index in range(64)),
    )


def time_copy(source: Path, target: Path) -> float:
    """Seconds of a real copy (no shared blocks) and the sync of that copy; the copy is removed."""
    reflink = [] if sys.platform == "darwin" else ["--reflink=never"]
    begin = time.perf_counter()
    subprocess.run(["cp", *reflink, str(source), str(target)], check=True)
    descriptor = os.open(target, os.O_RDWR)
    os.fsync(descriptor)
    os.close(descriptor)
    seconds = time.perf_counter() - begin
    remove(target)
    return seconds


def time_patch(source: Path, record: Path, target: Path) -> tuple[float, int]:
    """Seconds and peak resident bytes of `longrope patch`; the new file is removed."""
    _, seconds, peak = run_child([*LONGROPE, "patch", str(source), "--scaling", str(record), "--out", str(target)])
    remove(target)
    return seconds, peak


def remove(path: Path) -> None:
    """Remove a file and wait until the disk is quiet."""
    path.unlink()
    os.sync()


if __name__ == "__main__":
    main()
