"""Type-check the built wheel: run from the repository, mypy does not follow the folder mapping and skips most files."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("longrope_export", "search", "training", "converters")


def main() -> None:
    """Build the wheel, unpack it, check it strictly from an empty folder, and compare the number of files."""
    expected = sum(len(list((ROOT / room).rglob("*.py"))) for room in ROOMS)
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack files that are gone from the sources
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site, empty = folder / "site", folder / "empty"
        empty.mkdir()
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", str(site)]
        subprocess.run([*pip, str(ROOT)], check=True, stdout=subprocess.DEVNULL)
        # A folder of data counts as a namespace package for mypy.
        for data in ("demo_model", "recipe/shipped"):
            shutil.rmtree(site / "longrope_export" / data)
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "longrope_export"]
        cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
        environment = {**os.environ, "MYPYPATH": str(site)}
        result = subprocess.run([*command, *cache], cwd=empty, env=environment, capture_output=True, text=True)
    print(result.stdout.replace(str(site), ""), result.stderr, sep="")
    match = re.search(r"(?:checked|in) (\d+) source files", result.stdout)
    if result.returncode:
        sys.exit(result.returncode)
    if match is None or int(match[1]) != expected:
        sys.exit(f"mypy checked {match and match[1]} files, the four folders hold {expected}")


if __name__ == "__main__":
    main()
