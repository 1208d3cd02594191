"""Writers of other packages: the documented example as it stands, and everything that can be wrong with one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.cli.main import cli
from longrope_export.converters.writers import find_writer, write_with, writer_names
from longrope_export.errors import (
    LossyTargetError,
    MissingDependencyError,
    OutputError,
    ScalingError,
    UnsupportedModelError,
)
from longrope_export.files import check_manifest
from longrope_export.formats.records import RECORD_FILE

Record = Callable[..., RopeScaling]
PAGE = Path(__file__).parents[2] / "docs" / "writers.md"


def install(folder: Path, code: str, entries: dict[str, str], module: str, name: str = "other") -> Path:
    """A package as pip would leave it: its module, and metadata with the entry points."""
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{key} = {value}" for key, value in entries.items()]
    (information / "entry_points.txt").write_text("\n".join(["[longrope_export.writers]", *lines]) + "\n")
    (folder / f"{module}.py").write_text(code)
    return folder


def test_the_documented_example_works_as_it_stands(small_llama: Path, record: Record, tmp_path: Path) -> None:
    code, settings = re.findall(r"```(?:python|toml)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 30
    project = tomllib.loads(settings)["project"]
    site = install(
        tmp_path / "site", code, project["entry-points"]["longrope_export.writers"], "longrope_mlx", project["name"]
    )
    (tmp_path / RECORD_FILE).write_text(record(32).to_json())
    script = "from longrope_export.cli.main import main; main()"
    command = [sys.executable, "-c", script, "export", str(small_llama), "--scaling", str(tmp_path / RECORD_FILE),
               "--out", str(tmp_path / "out"), "--writer", "mlx"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(site)}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1, refused.stderr
    assert "long factors for short prompts too" in refused.stderr
    assert not (tmp_path / "out").exists()
    done = subprocess.run([*command, "--allow-lossy", "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "short prompts" in json.loads(done.stdout)["lossy"][0]
    scaling = json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]
    assert scaling["type"] == "longrope"
    assert "rope_type" not in scaling
    assert RopeScaling.from_json((tmp_path / "out" / RECORD_FILE).read_text()) == record(32)
    check_manifest(tmp_path / "out")


GOOD = """
class W:
    def losses(self, model, scaling):
        return []

    def write(self, model, scaling, folder):
        (folder / "seen.txt").write_text(f"{model.name} {scaling.rotary_dim}")
        if scaling.max_position_embeddings == 4096:
            raise RuntimeError("half-way")


WRITER = W()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"a": "good_writer:W", "b": "good_writer:WRITER", "gone": "good_writer:NOTHING", "lost": "no_such_module:W",
               "none": "good_writer:GROUP"}  # fmt: skip
    site = install(
        tmp_path / "one", GOOD + "\nGROUP = 3\n", {**entries, "twice": "good_writer:W"}, "good_writer", "one"
    )
    other = install(tmp_path / "two", GOOD, {"twice": "other_writer:W"}, "other_writer", "two")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.syspath_prepend(str(other))


def test_no_writer_is_there_unless_a_package_brings_one() -> None:
    assert writer_names() == []
    with pytest.raises(UnsupportedModelError, match=r"no installed package has a writer 'mlx'; there are: none"):
        find_writer("mlx")


@pytest.mark.usefixtures("installed")
def test_classes_and_objects_write_folders(small_llama: Path, record: Record, tmp_path: Path) -> None:
    assert writer_names() == ["a", "b", "gone", "lost", "none", "twice"]
    for name in ("a", "b"):
        assert write_with(name, small_llama, tmp_path / name, record(32)) == []
        assert (tmp_path / name / "seen.txt").read_text() == "llama 32"
        check_manifest(tmp_path / name)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("other", UnsupportedModelError, "there are: a, b, gone, lost, none, twice"),
        ("gone", MissingDependencyError, "cannot be loaded"),
        ("lost", MissingDependencyError, "no_such_module"),
        ("none", OutputError, "needs the methods losses and write"),
        ("twice", OutputError, "several packages have a writer 'twice': .*good_writer:W"),
    ],
)
def test_what_is_no_writer(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        find_writer(name)


@pytest.mark.usefixtures("installed")
def test_nothing_is_left_of_a_write_that_fails(small_llama: Path, record: Record, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="half-way"):
        write_with("a", small_llama, tmp_path / "out", record(32, max_position_embeddings=4096))
    with pytest.raises(ScalingError, match="made for another model"):
        write_with("a", small_llama, tmp_path / "out", record(16))
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


@pytest.mark.parametrize("option", [["--no-gguf"], ["--no-hf"], ["--dtype", "f16"]])
def test_options_of_our_own_writers_do_not_go_with_another(
    small_llama: Path, tmp_path: Path, option: list[str]
) -> None:
    given = ["export", str(small_llama), "--scaling", "x", "--out", str(tmp_path / "out"), "--writer", "a", *option]
    assert CliRunner().invoke(cli, given).exit_code == 2


@pytest.mark.usefixtures("installed")
def test_losses_are_refused_before_anything_is_written(small_llama: Path, record: Record, tmp_path: Path) -> None:
    import good_writer  # type: ignore[import-not-found]

    good_writer.W.losses = lambda self, model, scaling: ["it forgets"]
    with pytest.raises(LossyTargetError, match="it forgets"):
        write_with("a", small_llama, tmp_path / "out", record(32))
    assert write_with("a", small_llama, tmp_path / "out", record(32), allow_lossy=True) == ["it forgets"]
