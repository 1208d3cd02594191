"""The wheel, installed alone in an empty environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment that holds the wheel and its base dependencies, nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q"]
    shutil.rmtree(ROOT / "build", ignore_errors=True)  # setuptools would pack files that are gone from the sources
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)],
        check=True, capture_output=True,
    )  # fmt: skip
    wheel = next(folder.glob("*.whl"))
    venv.create(folder / "venv", with_pip=False)
    target = next((folder / "venv").rglob("site-packages"))
    subprocess.run(
        [*pip, "--python", str(folder / "venv" / "bin" / "python"), "install", "-c", str(ROOT / "constraints.txt"), str(wheel)],
        check=True, capture_output=True,
    )  # fmt: skip
    assert target.is_dir()
    return folder / "venv"


def run(environment: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    command = [str(environment / "bin" / arguments[0]), *arguments[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=environment, env=clean)


def test_only_our_package_is_put_into_site_packages(environment: Path) -> None:
    site = next(environment.rglob("site-packages"))
    ours = [
        entry
        for entry in site.iterdir()
        if entry.name.startswith(("longrope", "search", "training", "converters", "tests"))
    ]
    assert sorted(entry.name for entry in ours if entry.suffix != ".dist-info") == ["longrope_export"]
    assert (site / "longrope_export" / "search" / "strategies").is_dir()
    assert (site / "longrope_export" / "py.typed").exists()
    assert (site / "longrope_export" / "demo_model" / "model.safetensors").exists()
    assert (site / "longrope_export" / "recipe" / "shipped" / "demo.yaml").exists()


def test_help_takes_less_than_half_a_second_without_torch(environment: Path) -> None:
    assert run(environment, "python", "-c", "import torch").returncode != 0
    run(environment, "longrope", "--help")
    times = []
    for _ in range(5):
        before = processor_seconds_of_children()
        result = run(environment, "longrope", "--help")
        times.append(processor_seconds_of_children() - before)
        assert result.returncode == 0, result.stderr
    assert 0.01 < min(times) < 0.5


def processor_seconds_of_children() -> float:
    """Of finished child processes: what a start costs, however many others share the machine's cores."""
    times = os.times()
    return times.children_user + times.children_system


def test_gguf_commands_work_without_torch(environment: Path, smollm2: Path, tmp_path: Path) -> None:
    target = tmp_path / "longer.gguf"
    for arguments in (
        ["describe", str(smollm2)],
        ["extend", str(smollm2), "--to", "4x", "--method", "yarn", "--out", str(target)],
        ["describe", str(target)],
        ["read", str(target), "--json"],
    ):
        result = run(environment, "longrope", *arguments)
        assert result.returncode == 0, result.stderr


def test_commands_that_need_torch_say_so_in_one_line(environment: Path, smollm2: Path, tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("word " * 100)
    result = run(
        environment, "longrope", "search", str(smollm2), "--to", "4x", "--data", str(text), "--out", str(tmp_path / "o")
    )
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "longrope-export[model]" in result.stderr
