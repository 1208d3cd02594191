"""The rules of the house: rooms, import names, heavy imports, skipped checks."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("longrope_export", "search", "training", "converters")
SOURCES = sorted(path for room in (*ROOMS, "tests", "benchmarks") for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def module_level_imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_are_imported_by_their_full_name(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] in ("search", "training", "converters")}


@pytest.mark.parametrize("path", sorted((ROOT / "longrope_export").rglob("*.py")), ids=lambda path: path.name)
def test_the_core_imports_no_other_room_at_module_level(path: Path) -> None:
    rooms = ("longrope_export.search", "longrope_export.training", "longrope_export.converters")
    assert not {name for name in module_level_imports(path) if name.startswith(rooms)}


def test_the_rooms_do_not_import_one_another() -> None:
    for room in ("search", "training", "converters"):
        others = {f"longrope_export.{other}" for other in ("search", "training", "converters") if other != room}
        for path in (ROOT / room).rglob("*.py"):
            assert not {name for name in imported(path) if ".".join(name.split(".")[:2]) in others}, path


def test_every_package_is_listed_for_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        str(file.parent.relative_to(ROOT)).replace("/", ".")
        for room in ROOMS
        for file in (ROOT / room).rglob("__init__.py")
    }
    expected = {name if name.startswith("longrope_export") else f"longrope_export.{name}" for name in found}
    assert set(settings["packages"]) == expected


def test_no_folder_with_code_lacks_its_init() -> None:
    for room in ROOMS:
        for path in (ROOT / room).rglob("*.py"):
            assert (path.parent / "__init__.py").exists(), path


@pytest.mark.parametrize("arguments", [["--help"], ["describe", "--help"], ["patch", "--help"], ["extend", "--help"]])
def test_light_commands_import_neither_torch_nor_transformers(arguments: list[str]) -> None:
    script = (
        "import sys\nfrom longrope_export.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'tokenizers', 'safetensors', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "module",
    [
        "longrope_export",
        "longrope_export.cli.patch",
        "longrope_export.converters.gguf.patch",
        "longrope_export.converters.gguf.in_place",
        "longrope_export.converters.gguf.in_place_recovery",
    ],
)
def test_import_works_where_posix_calls_are_missing(module: str) -> None:
    script = (
        "import os, sys, importlib\n"
        "for name in ('fcntl', 'resource', 'termios', 'grp', 'pwd'):\n    sys.modules[name] = None\n"
        "for name in ('posix_fallocate', 'copy_file_range', 'sendfile', 'fork', 'sched_getaffinity'):\n"
        "    os.__dict__.pop(name, None)\n"
        f"importlib.import_module({module!r})\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("in_ci", [True, False])
def test_a_skipped_test_fails_in_ci(tmp_path: Path, in_ci: bool) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text("import pytest\n\ndef test_it():\n    pytest.skip('no llama.cpp')\n")
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | ({"CI": "true"} if in_ci else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert result.returncode == (1 if in_ci else 0), result.stdout
