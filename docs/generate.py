"""Write docs/cli.md from the commands' own --help, and the file tree in README.md from the modules' first lines.

`make docs` runs it; a test compares.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import click

from longrope_export.cli.main import COMMANDS, cli

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs" / "cli.md"
README = ROOT / "README.md"
FOLDERS = ("longrope_export", "search", "training", "converters", "benchmarks")
_TREE = re.compile(r"(?<=<!-- tree -->\n)```text\n.*?```(?=\n<!-- /tree -->)", re.DOTALL)


def command_reference() -> str:
    """Markdown with the help of `longrope` and of every command."""
    parent = click.Context(cli, info_name="longrope", terminal_width=100, max_content_width=100)
    parts = ["# Commands\n\nGenerated from `--help` by `make docs`.", _block("longrope", cli.get_help(parent))]
    for name in COMMANDS:
        command = cli.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
        parts.append(_block(f"longrope {name}", command.get_help(context)))
    return "\n\n".join(parts) + "\n"


def file_tree() -> str:
    """The folders of the code with every module's first docstring line, as a text block."""
    lines = ["longrope-export/"]
    for folder in FOLDERS:
        lines += [f"  {folder}/", *_folder_lines(ROOT / folder, 2)]
    lines += [
        "  tests/                    the same folders",
        "  docs/",
        "  .ci/run                   everything, from scratch",
    ]
    return "```text\n" + "\n".join(lines) + "\n```"


def readme() -> str:
    """README.md with its file tree renewed."""
    tree = file_tree()
    return _TREE.sub(lambda _: tree, README.read_text())


def _folder_lines(folder: Path, depth: int) -> list[str]:
    lines = []
    files = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    for path in files:
        lines.append(f"{'  ' * depth}{path.name:<{28 - 2 * depth}}{_first_line(path)}")
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.glob("*.py"))):
        lines += [f"{'  ' * depth}{inner.name}/", *_folder_lines(inner, depth + 1)]
    return lines


def _first_line(path: Path) -> str:
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
    sentence = re.split(r"(?<=\.)\s", text)[0].rstrip(".")
    return sentence if len(sentence) <= 110 else sentence[:109].rsplit(" ", 1)[0] + " …"


def _block(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text}\n```"


def main() -> None:
    """Write both files; with `--check` only tell, by the exit code, whether they are current."""
    pages = {REFERENCE: command_reference(), README: readme()}
    if sys.argv[1:] == ["--check"]:
        stale = [path.name for path, text in pages.items() if path.read_text() != text]
        sys.exit(f"not current: {', '.join(stale)}; run: make docs" if stale else 0)
    for path, text in pages.items():
        path.write_text(text)


if __name__ == "__main__":
    main()
