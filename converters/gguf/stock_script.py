"""Running llama.cpp's own convert_hf_to_gguf.py, which knows every family, as a process of its own.

The script is the user's: nothing of it is part of this package, and it decides itself what it runs of a model folder
(some of its classes load a tokenizer's own code).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from longrope_export.errors import InputFileError, OutputError, RuntimeFailure
from longrope_export.runtimes.llamacpp import cause_of_death

_TAIL = 1 << 16
# Options that change which file is written, where, or whether one is.
_OURS = ("--outfile", "--dry-run", "--print-supported-models", "--mmproj", "--remote", "--vocab-only", "--bigendian")
_NAME = "model.gguf"

Echo = Callable[[bytes], None]


def run_stock_script(
    script: Path, model: Path, folder: Path, options: Sequence[str] = (), *, echo: Echo | None = None
) -> Path:
    """Convert `model` with `script` into the empty `folder`; the GGUF file, or the first shard of a split one.

    Runs with the interpreter that runs this; what the script prints goes to `echo`. Raises `InputFileError` when
    there is no script, `OutputError` for an option that is not for it to get, `RuntimeFailure` with the last line that
    it printed when it fails or leaves no GGUF.
    """
    check_script(script, options)
    command = [sys.executable, str(script), str(model), "--outfile", str(folder / _NAME), *options]
    code, said = _run(command, echo)
    if code:
        raise RuntimeFailure(f"{script} ended {cause_of_death(code)}: {_last_line(said)}")
    found = sorted(folder.glob("*.gguf"))
    if not found:
        raise RuntimeFailure(f"{script} wrote no GGUF file: {_last_line(said)}")
    return found[0]


def check_script(script: Path, options: Sequence[str]) -> None:
    """Raise `InputFileError` when there is no script, `OutputError` for an option that it must not get."""
    if not script.is_file():
        raise InputFileError(f"{script} is not a file; name the convert_hf_to_gguf.py of a llama.cpp checkout")
    for option in options:
        name = option.partition("=")[0]
        # argparse takes any unambiguous beginning of an option's name
        if len(name) > 2 and (ours := [known for known in _OURS if known.startswith(name)]):
            raise OutputError(f"{ours[0]} is not passed on to {script.name}: one whole model is written to --out")


def _run(command: list[str], echo: Echo | None) -> tuple[int, bytes]:
    tail = b""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, bufsize=0
    )
    assert process.stdout is not None
    with process:
        try:
            while block := process.stdout.read(1 << 16):
                tail = (tail + block)[-_TAIL:]
                if echo is not None:
                    echo(block)
        except BaseException:
            process.kill()
            raise
    return process.returncode, tail


def _last_line(said: bytes) -> str:
    text = said.decode("utf-8", errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"
