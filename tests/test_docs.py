"""Documentation that would go stale without a check."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_reference_is_current() -> None:
    assert (ROOT / "docs" / "cli.md").read_text() == generator().command_reference(), "run: make docs"


def test_the_file_tree_in_the_readme_is_current() -> None:
    assert "<!-- tree -->" in (ROOT / "README.md").read_text()
    assert (ROOT / "README.md").read_text() == generator().readme(), "run: make docs"


def test_every_module_is_in_the_tree() -> None:
    tree = generator().file_tree()
    for folder in ("longrope_export", "search", "training", "converters", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f" {path.name}" in tree or path.name == "__init__.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    from longrope_export.cli.main import COMMANDS

    for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(), re.DOTALL):
        for name in re.findall(r"^\s*longrope ([a-z]+)", block, re.MULTILINE):
            assert name in COMMANDS, f"{page.name} names the command {name}"
