"""Time and written bytes of `longrope patch --in-place` and `longrope unpatch` on a small and a large file.

    python benchmarks/patch_in_place.py [--gigabytes 2 40] [--rounds 5] [--folder .]

The files are preallocated, not sparse, and lie on a file system that can insert room (ext4, XFS). Each round patches
and restores each of them in turn; the median start-up (`longrope --help`) is subtracted, from the processor's seconds
too. Written bytes are those of /proc/self/io, in units of the original header.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
import sys
import tempfile
from pathlib import Path

from common import machine, run_child
from patch_speed import make_record, write_model

from longrope_export.formats.gguf_header import read_gguf_header

COUNTED = [
    sys.executable,
    "-c",
    "import sys\nfrom longrope_export.cli.main import main\n"
    "try:\n    main()\nexcept SystemExit as stopped:\n    assert not stopped.code\n"
    "print(open('/proc/self/io').read())\nimport time\nprint('processor:', time.process_time())",
]


def main() -> None:
    """Parse the options, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[2, 40])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="in-place-speed-") as folder:
        found = [measure(Path(folder), gigabytes, options.rounds) for gigabytes in options.gigabytes]
    print(json.dumps({"machine": machine(), "files": found}, indent=2))


def measure(folder: Path, gigabytes: float, rounds: int) -> dict[str, object]:
    """Medians over `rounds` rounds after one that is not counted."""
    model, record = folder / "model.gguf", folder / "longrope.json"
    write_model(model, gigabytes, preallocated=True)
    record.write_text(make_record().to_json())
    header, before = read_gguf_header(model).data_start, state(model)
    commands = {
        "patch": ["patch", str(model), "--scaling", str(record), "--in-place"],
        "unpatch": ["unpatch", str(model)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("start", *commands)}
    processor: dict[str, list[float]] = {name: [] for name in ("start", *commands)}
    written: dict[str, int] = {}
    for _ in range(rounds + 1):
        for name, command in {"start": ["--help"], **commands}.items():
            output, taken, _ = run_child([*COUNTED, *command])
            seconds[name].append(taken)
            processor[name].append(float(output.rpartition("processor: ")[2]))
            written[name] = max(int(count) for count in re.findall(r"^(?:wchar|write_bytes): (\d+)", output, re.M))
        assert state(model) == before, "unpatch must bring back size and header"
    size = model.stat().st_size
    model.unlink()
    return {
        "gigabytes": round(size / 1e9, 2),
        "header_megabytes": round(header / 1e6, 2),
        "start_seconds": round(statistics.median(seconds["start"]), 3),
        **{f"{name}_seconds": beyond_start(seconds, name) for name in commands},
        **{f"{name}_processor_seconds": beyond_start(processor, name) for name in commands},
        **{f"{name}_written_headers": round(written[name] / header, 3) for name in commands},
    }


def beyond_start(seconds: dict[str, list[float]], name: str) -> list[float]:
    """Least and median seconds beyond the median start-up, the first round apart."""
    start = statistics.median(seconds["start"][1:])
    return [round(min(seconds[name][1:]) - start, 3), round(statistics.median(seconds[name][1:]) - start, 3)]


def state(model: Path) -> tuple[int, str]:
    """Size of the file and SHA-256 of its header and first data."""
    with model.open("rb") as file:
        return model.stat().st_size, hashlib.sha256(file.read(64 << 20)).hexdigest()


if __name__ == "__main__":
    main()
