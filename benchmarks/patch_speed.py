"""Time and memory of `longrope patch` against `cp` plus a sync of the copy, on a GGUF of random bytes.

    python benchmarks/patch_speed.py [--gigabytes 2.2] [--rounds 5] [--folder .]

Each round runs cp and patch in turn (order alternating), both on a source in the page cache; start-up
(`longrope --help`) is measured in the same round and subtracted from patch. Prints the ratio of the medians.
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

import gguf
import numpy as np

from longrope_export.scaling import RopeScaling

VOCABULARY = 151_936
THETA = 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="patch-speed-") as folder:
        print(json.dumps(measure(Path(folder), options.gigabytes, options.rounds), indent=2))


def measure(folder: Path, gigabytes: float, rounds: int) -> dict[str, float]:
    source, record = folder / "source.gguf", folder / "longrope.json"
    write_model(source, gigabytes)
    record.write_text(make_record().to_json())
    copies, patches, starts, memory = [], [], [], []
    for index in range(rounds + 1):
        steps = [
            lambda: copies.append(time_copy(source, folder / "copy.gguf")),
            lambda: patches.append(time_patch(source, record, folder / "new.gguf", memory)),
        ]
        for step in steps if index % 2 else reversed(steps):
            step()
        starts.append(run([sys.executable, "-m", "longrope_export.cli", "--help"])[0])
    copy, patch, start = (statistics.median(times[1:]) for times in (copies, patches, starts))
    return {
        "gigabytes": round(source.stat().st_size / 1e9, 3),
        "copy_seconds": round(copy, 3),
        "patch_seconds": round(patch, 3),
        "start_seconds": round(start, 3),
        "ratio": round((patch - start) / copy, 3),
        "peak_megabytes": round(max(memory) / 1e6, 1),
    }


def write_model(path: Path, gigabytes: float) -> None:
    """A llama GGUF with F16 tensors of random bytes and a vocabulary of Qwen2's size."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(8192)
    writer.add_rope_dimension_count(128)
    writer.add_rope_freq_base(THETA)
    writer.add_token_list([f"token{index}" for index in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges([f"left{index} right{index}" for index in range(VOCABULARY)])
    shape, count = (4096, 4096), round(gigabytes * 1e9 / (2 * 4096 * 4096))
    for index in range(count):
        writer.add_tensor_info(
            f"blk.{index}.ffn_up.weight", shape, np.dtype(np.float16), 2 * shape[0] * shape[1]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for _ in range(count):
        writer.write_tensor_data(
            np.frombuffer(generator.bytes(2 * shape[0] * shape[1]), np.float16).reshape(shape)
        )
    writer.close()
    os.sync()


def make_record() -> RopeScaling:
    return RopeScaling(
        rope_theta=THETA,
        rotary_dim=128,
        original_max_position_embeddings=8192,
        max_position_embeddings=32768,
        long_factor=tuple(np.linspace(1, 4, 64)),
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
    target.unlink()
    os.sync()
    return seconds


def time_patch(source: Path, record: Path, target: Path, memory: list[int]) -> float:
    seconds, peak = run(
        [
            sys.executable,
            "-m",
            "longrope_export.cli",
            "patch",
            str(source),
            "--scaling",
            str(record),
            "--out",
            str(target),
        ]
    )
    memory.append(peak)
    target.unlink()
    os.sync()
    return seconds


def run(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a child process."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    child.returncode = 0
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
