"""The `longrope` command group: imports a command's module only when that command runs."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click

from longrope_export import __version__
from longrope_export.cli.tables import printable
from longrope_export.errors import LongRopeError, MissingDependencyError
from longrope_export.formats.unfinished import unfinished_files

# name → (module, attribute, one line for --help); kept here so that --help imports no command.
COMMANDS = {
    "demo": ("demo", "demo", "The whole job on the embedded model, in a few minutes."),
    "extend": ("extend", "extend", "Give a model a longer window: find factors, embed them, check them."),
    "plan": ("plan", "plan", "Will it fit? Cache size, memory and time at the longer window."),
    "describe": ("describe", "describe", "Show a model's RoPE, window, scaling and which runtimes honour factors."),
    "search": ("search", "search", "Search the rescale factors for a longer window."),
    "finetune": ("finetune", "finetune", "Tune a model with its factors, on your texts, in little memory."),
    "eval": ("evaluate", "evaluate", "Measure what an extension is worth: perplexity, retention, retrieval."),
    "report": ("report", "report", "One HTML page with plots of what a folder holds."),
    "patch": ("patch", "patch", "Embed factors in an existing GGUF file; no weight is touched."),
    "unpatch": ("unpatch", "unpatch", "Undo `patch --in-place`: every byte as it was."),
    "export": ("export", "export", "Write an HF folder and a GGUF from one model and one record."),
    "convert": ("convert", "convert", "Write one GGUF file with factors: of any family, with llama.cpp's own script."),
    "read": ("read", "read", "Give the scaling record back from any file that carries one."),
    "import": ("import_", "import_command", "Make longrope.json from another tool's factors or a config."),
    "doctor": ("doctor", "doctor", "Find and mend wrong RoPE scaling in a GGUF file or a model folder."),
    "verify": ("verify", "verify", "Prove that transformers and llama.cpp apply the embedded factors."),
}


# Top-level module → the extra that installs it.
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "safetensors", "tokenizers", "accelerate"), "model"),
    "xllamacpp": "runtime",
    "peft": "train",
    "matplotlib": "plot",
    "ray": "ray",
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and help lines without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        command = getattr(importlib.import_module(f"longrope_export.cli.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="longrope")
def cli() -> None:
    """Give RoPE language models a longer context window, exactly, in every runtime.

    \b
    Examples:
      longrope describe model.gguf
      longrope extend model.gguf --to 4x --method yarn --out longer.gguf
      longrope extend MODEL --to 4x --data book.txt --out DIR
      longrope verify longer.gguf
    """


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: user errors become one line on stderr and exit code 1; bugs keep their traceback."""
    try:
        return _run(arguments)
    except LongRopeError as error:
        # A stranger's file may put terminal escapes into a message.
        click.echo(f"longrope: {printable(error)}", err=True)
        sys.exit(1)
    except OSError as error:
        if error.errno is None:
            raise
        # What no reader or writer put into words: a name that is too long, a folder that may not be entered.
        place = f"{error.filename}: " if error.filename else ""
        click.echo(f"longrope: {printable(place)}{error.strerror}", err=True)
        sys.exit(1)


def _run(arguments: list[str] | None) -> Any:
    mend_unfinished(sys.argv[1:] if arguments is None else arguments)
    try:
        return cli.main(args=arguments, prog_name="longrope")
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in EXTRAS:
            raise
        raise MissingDependencyError(
            f"this command needs {module}: pip install 'longrope-export[{EXTRAS[module]}]'"
        ) from error


def mend_unfinished(arguments: list[str]) -> None:
    """Finish or undo a change in place that was cut short, of any file that an argument names (or whose folder)."""
    places = [text for argument in arguments for text in (argument, argument.partition("=")[2])]
    for file in [file for place in places for file in unfinished_files(Path(place))]:
        from longrope_export.converters.gguf.in_place_recovery import recover

        outcome = recover(file)
        if outcome:
            click.echo(f"{printable(file)}: a change in place had been cut short; it is {outcome} now", err=True)
