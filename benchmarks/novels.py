"""Six long novels as text files, from Debian's package r-cran-janeaustenr (Jane Austen, public domain).

    apt-get download r-cran-janeaustenr        # or https://packages.debian.org/r-cran-janeaustenr
    python benchmarks/novels.py r-cran-janeaustenr_1.0.0-1_all.deb --out novels

The package holds R objects: a table of zlib streams, each a character vector in R's XDR serialization.
"""

from __future__ import annotations

import argparse
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

# A CHARSXP (type 9) in ASCII: R Internals, "Serialization Formats".
_STRING = b"\x00\x04\x00\x09"


def main() -> None:
    """Write one file per novel, named by its first line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(options.package), folder], check=True)
        (table,) = Path(folder).rglob("data/Rdata.rdb")
        for lines in novels(table.read_bytes()):
            name = lines[0].title().replace(" ", "")
            (options.out / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(f"{name}: {len(lines):,} lines")


def novels(table: bytes) -> Iterator[list[str]]:
    """The lines of every object of an R lazy-load table: records of a length (4 bytes) and a zlib stream."""
    start = 0
    while start < len(table):
        stream = zlib.decompressobj()
        data = stream.decompress(table[start + 4 :])
        yield list(_strings(data))
        start = len(table) - len(stream.unused_data)


def _strings(data: bytes) -> Iterator[str]:
    at = data.find(_STRING)
    while at >= 0:
        (length,) = struct.unpack(">i", data[at + 4 : at + 8])
        yield data[at + 8 : at + 8 + length].decode("ascii")
        at = data.find(_STRING, at + 8 + length)


if __name__ == "__main__":
    main()
