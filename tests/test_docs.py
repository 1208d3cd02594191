"""Documentation that would go stale without a check."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
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


def test_generated_pages_are_current() -> None:
    # In a process of its own: click keeps the help option of a command's first context.
    command = [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_stale_page_is_noticed(tmp_path: Path) -> None:
    module = generator()
    assert "<!-- tree -->" in module.readme()
    (tmp_path / "README.md").write_text("<!-- tree -->\n```text\nold\n```\n<!-- /tree -->\n")
    module.README = tmp_path / "README.md"
    assert module.readme() != module.README.read_text()


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
