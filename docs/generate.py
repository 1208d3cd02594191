"""Write docs/cli.md from the commands' own --help; `make docs` runs it, a test compares."""

from __future__ import annotations

from pathlib import Path

import click

from longrope_export.cli.main import COMMANDS, cli

TARGET = Path(__file__).parent / "cli.md"


def command_reference() -> str:
    """Markdown with the help of `longrope` and of every command."""
    parent = click.Context(cli, info_name="longrope")
    parts = ["# Commands\n\nGenerated from `--help` by `make docs`.", _block("longrope", cli.get_help(parent))]
    for name in COMMANDS:
        command = cli.get_command(parent, name)
        assert command is not None
        context = click.Context(command, info_name=name, parent=parent, max_content_width=100, terminal_width=100)
        parts.append(_block(f"longrope {name}", command.get_help(context)))
    return "\n\n".join(parts) + "\n"


def _block(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text}\n```"


if __name__ == "__main__":
    TARGET.write_text(command_reference())
