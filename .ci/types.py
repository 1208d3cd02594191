"""Type-check the built wheel, and the benchmarks against it.

Run from the repository, mypy does not follow the folder mapping and skips most files.
"""

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
    """Build the wheel, unpack it, check it strictly from an empty folder, and compare the numbers of files."""
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
        _check(["-p", "longrope_export"], expected, site, empty)
        scripts = sorted((ROOT / "benchmarks").glob("*.py"))
        _check([str(script) for script in scripts], len(scripts), site, empty)


def _check(targets: list[str], expected: int, site: Path, empty: Path) -> None:
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *targets]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join((str(site), str(ROOT / "benchmarks")))}
    result = subprocess.run([*command, *cache], cwd=empty, env=environment, capture_output=True, text=True)
    print(result.stdout.replace(str(site), ""), result.stderr, sep="")
    match = re.search(r"(?:checked|in) (\d+) source files", result.stdout)
    if result.returncode:
        sys.exit(result.returncode)
    if match is None or int(match[1]) != expected:
        sys.exit(f"mypy checked {match and match[1]} files where there are {expected}")


if __name__ == "__main__":
    main()
