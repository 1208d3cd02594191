"""A llama.cpp that stays answers like one that is started for every prompt, and its end is an error, never a wait."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from longrope_export.errors import InputFileError, RuntimeFailure
from longrope_export.runtimes import llamacpp
from longrope_export.runtimes.llamacpp_session import Session

PROMPTS = [[300, 65, 66, 67], [300, *range(70, 170)], [300, 65, 66, 67]]


@pytest.fixture(scope="module")
def gguf(write_random_gguf: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_gguf(tmp_path_factory.mktemp("session") / "model.gguf")


def test_answers_are_those_of_a_fresh_llamacpp_whatever_came_before(gguf: Path) -> None:
    with Session(gguf, context=256) as session:
        answers = [session.generate(prompt, 12, ignore_eos=True) for prompt in PROMPTS]
        assert session.generate(PROMPTS[0], 3, ignore_eos=True) == answers[0][:3]
        with pytest.raises(RuntimeFailure, match="a prompt of 250 tokens and 20 more do not fit"):
            session.generate([65] * 250, 20)
        pid = session._child.pid
    assert answers[0] == answers[2] != answers[1]
    assert answers[1] == llamacpp.generate(gguf, PROMPTS[1], 12, context=256, ignore_eos=True)
    assert all(len(answer) == 12 for answer in answers)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_an_answer_ends_where_the_context_is_full(gguf: Path) -> None:
    with Session(gguf, context=256) as session:
        found = [len(session.generate([300, *[65] * 249], count, ignore_eos=True)) for count in (5, 6, 7)]
    assert found == [5, 6, 6]


def test_the_end_token_ends_an_answer_unless_it_is_ignored(
    write_random_gguf: Callable[..., Path], gguf: Path, tmp_path: Path
) -> None:
    with Session(gguf, context=256) as session:
        endless = session.generate(PROMPTS[1], 8, ignore_eos=True)
    at = next(index for index in range(1, 8) if endless[index] not in endless[:index])
    other = write_random_gguf(tmp_path / "other.gguf", eos=endless[at])
    with Session(other, context=256) as session:
        assert [token for token in session.generate(PROMPTS[1], 8) if token != endless[at]] == endless[:at]


def test_a_dying_llamacpp_is_an_error_that_says_how(gguf: Path) -> None:
    with Session(gguf, context=256) as session:
        os.kill(session._child.pid, signal.SIGKILL)
        with pytest.raises(RuntimeFailure, match=r"llama\.cpp died by SIGKILL on .*model\.gguf"):
            session.generate(PROMPTS[0], 3)


def test_a_file_that_llamacpp_refuses_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(RuntimeFailure, match=r"llama\.cpp (refused|died)"):
        Session(tmp_path / "broken.gguf", context=256)
    with pytest.raises(InputFileError, match="does not exist"):
        Session(tmp_path / "missing.gguf", context=256)


def test_an_answer_that_does_not_come_in_time_is_an_error(gguf: Path) -> None:
    with Session(gguf, context=256) as session:
        session.timeout = 0.0
        with pytest.raises(RuntimeFailure, match=r"did not answer for .* in 0 s"):
            session.generate(PROMPTS[0], 200, ignore_eos=True)
