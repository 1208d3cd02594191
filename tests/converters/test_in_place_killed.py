"""A change in place that is stopped by SIGKILL before any of its system calls is finished or undone by the next command."""

from __future__ import annotations

import ast
import contextlib
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longrope_export import RopeScaling
from longrope_export.cli.main import main
from longrope_export.converters.gguf import in_place
from longrope_export.errors import InputFileError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.unfinished import record_path

Record = Callable[..., RopeScaling]
Build = Callable[..., Path]
DRIVER = Path(__file__).parent / "killed_in_place.py"


@pytest.fixture
def killed(gguf_file: Build, record: Record, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the driver on a file with room for two sets in the middle and one at the end."""

    def run(action: str, *options: object) -> dict[str, Any]:
        folder = tmp_path / "alone"
        folder.mkdir()
        model = gguf_file(tensors={"rope_freqs.weight": [1.0] * 8}).rename(folder / "model.gguf")
        for name, window in (("first", 2048), ("second", 4096)):
            (tmp_path / f"{name}.json").write_text(record(max_position_embeddings=window).to_json())
        command = [sys.executable, DRIVER, model, tmp_path / "first.json", tmp_path / "second.json", action, *options]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return run


@pytest.mark.parametrize("action", ["patch", "again", "unpatch"])
def test_killed_before_every_call(killed: Callable[..., dict[str, Any]], action: str) -> None:
    found = killed(action)
    assert found["before"] != found["after"] == found["completed"]
    assert len(found["results"]) > 30
    for result in found["results"]:
        assert result["files"] == ["model.gguf"], result
        expected = {"undone": found["before"], "finished": found["after"]}
        # Before the record exists, and once it is gone, there is nothing to mend.
        wanted = [expected[result["outcome"]]] if result["outcome"] else [found["before"], found["after"]]
        assert result["sha256"] in wanted, result
        assert result["magic"] in ("GGUF", "LRUF", "LRIP", "GGIP", "\0\0\0\0")
    outcomes = Counter(result["outcome"] for result in found["results"])
    assert outcomes["undone"] > 10
    assert outcomes["finished"] >= 1
    assert any(result["magic"] != "GGUF" for result in found["results"])


def check_all(found: dict[str, Any], least: int) -> None:
    assert len(found["results"]) > least
    for result in found["results"]:
        assert result["files"] == ["model.gguf"], result
        assert result["sha256"] in (found["before"], found["after"]), result


def test_killed_again_while_mending(killed: Callable[..., dict[str, Any]]) -> None:
    check_all(killed("again", "--twice", 8), 50)


@pytest.mark.slow
@pytest.mark.parametrize("action", ["patch", "again", "unpatch"])
def test_killed_at_every_pair_of_calls(killed: Callable[..., dict[str, Any]], action: str) -> None:
    check_all(killed(action, "--twice", 1), 400)


READING = {"posix_fadvise", "fstat", "stat", "pread", "getpid", "strerror", "unlink", "fspath"}


def test_every_call_that_changes_a_file_is_a_step() -> None:
    """The driver counts every function of `os` that the modules call, apart from those that only look."""
    tree = ast.parse(DRIVER.read_text())
    counted = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "CHANGING"
    )
    modules = sorted((Path(in_place.__file__)).parent.glob("in_place*.py"))
    assert len(modules) > 7
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = getattr(node.func.value, "id", "")
                assert owner != "os" or node.func.attr in {*counted, *READING}, (module.name, node.func.attr)


def test_the_next_command_mends_the_file(
    gguf_file: Build, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = gguf_file()
    before = model.read_bytes()
    for step, arguments in ((26, ["describe", str(model)]), (18, ["describe", str(tmp_path)])):
        killed_at(step, model, record, tmp_path)
        assert model.read_bytes()[:4] != b"GGUF"
        with pytest.raises(InputFileError, match="was being changed in place"):
            read_gguf_header(model)
        with contextlib.suppress(SystemExit):
            main(arguments)
        assert "a change in place had been cut short; it is undone now" in capsys.readouterr().err
        assert model.read_bytes() == before
        assert not record_path(model).exists()


def killed_at(step: int, model: Path, record: Record, folder: Path) -> None:
    """Let a child die before its call number `step` of a patch in place."""
    (folder / "record.json").write_text(record().to_json())
    script = (
        f"import sys; sys.path.insert(0, {str(DRIVER.parent)!r})\n"
        "import killed_in_place as driver\n"
        "from pathlib import Path\n"
        f"scaling = driver.read_scaling({str(folder / 'record.json')!r})\n"
        f"driver.die_before({step})\n"
        f"driver.patch_in_place({str(model)!r}, scaling)\n"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
