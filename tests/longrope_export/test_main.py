"""The command's edge: one line for user errors, tracebacks for bugs, nothing heavy before it is needed."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest

from longrope_export.cli import main as edge
from longrope_export.cli.common import result_alone_on_stdout
from longrope_export.errors import InputFileError


def outcome(
    capsys: pytest.CaptureFixture[str], error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> tuple[object, str]:
    """Exit code and stderr of a command that raises `error`."""

    @click.command()
    def broken() -> None:
        raise error

    monkeypatch.setattr(edge.LazyGroup, "get_command", lambda self, ctx, name: broken)
    with pytest.raises(SystemExit) as exit_info:
        edge.main(["describe"])
    return exit_info.value.code, capsys.readouterr().err


def test_user_errors_are_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcome(capsys, InputFileError("a.gguf is torn; copy it again"), monkeypatch) == (
        1,
        "longrope: a.gguf is torn; copy it again\n",
    )


def test_escape_codes_in_a_message_do_not_reach_the_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = outcome(capsys, InputFileError("key \x1b[2J\nb"), monkeypatch)
    assert "\x1b" not in text
    assert text.count("\n") == 1


def test_a_missing_optional_package_names_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, text = outcome(capsys, ModuleNotFoundError("No module named 'torch'", name="torch.nn"), monkeypatch)
    assert code == 1
    assert "pip install 'longrope-export[model]'" in text


def test_what_the_system_refuses_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PermissionError(13, "Permission denied", "secret\x1b/model.gguf")
    expected = (1, "longrope: secret\\x1b/model.gguf: Permission denied\n")
    assert outcome(capsys, error, monkeypatch) == expected
    with pytest.raises(SystemExit) as exit_info:
        monkeypatch.undo()
        edge.main(["describe", "x" * 400])
    assert exit_info.value.code == 1
    assert capsys.readouterr().err.endswith(": File name too long\n")


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for bug in (
        ZeroDivisionError("bug"),
        OSError("without a number"),
        ModuleNotFoundError("ours", name="longrope_export.nothing"),
    ):
        with pytest.raises(type(bug)):
            outcome(capsys, bug, monkeypatch)


def test_every_command_in_the_table_exists() -> None:
    context = click.Context(edge.cli)
    for name in edge.COMMANDS:
        command = edge.cli.get_command(context, name)
        assert command is not None
        assert command.help
    assert edge.cli.get_command(context, "nothing") is None


def test_a_wrong_option_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as exit_info:
        edge.main(["extend", str(tmp_path), "--to", "long"])
    assert exit_info.value.code == 2
    assert "write 16384, 32k, 1m or 4x" in capsys.readouterr().err


def test_what_libraries_print_stays_off_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputFileError), result_alone_on_stdout():
        print("from Python")
        os.write(1, b"from below\n")
        raise InputFileError("torn")
    click.echo("the result")
    assert capfd.readouterr() == ("the result\n", "from Python\nfrom below\n")
