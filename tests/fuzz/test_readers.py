"""The fuzzer itself: its corpus reaches what it should, it finds planted bugs, and a short run finds none."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from longrope_export.errors import InputFileError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.records import read_scaling
from longrope_export.formats.safetensors_header import read_safetensors_header

FOLDER = Path(__file__).parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def readers() -> ModuleType:
    return load("readers")


@pytest.fixture(scope="module")
def corpus() -> ModuleType:
    return load("corpus")


def test_the_kept_corpus_is_the_written_one(corpus: ModuleType) -> None:
    for kind, seeds in (("gguf", corpus.gguf_seeds()), ("safetensors", corpus.safetensors_seeds())):
        kept = {path.stem: path.read_bytes() for path in (FOLDER / "corpus" / kind).iterdir()}
        assert kept == seeds


REFUSED = {"nested.gguf": "nested", "deep.safetensors": "must have dtype", "numbers.safetensors": "impossible shape"}


@pytest.mark.parametrize("path", sorted((FOLDER / "corpus").rglob("*.*")), ids=lambda path: path.name)
def test_seeds_reach_far(path: Path) -> None:
    """Every seed is accepted, apart from those that must not be."""
    read = read_gguf_header if path.suffix == ".gguf" else read_safetensors_header
    if path.name in REFUSED:
        with pytest.raises(InputFileError, match=REFUSED[path.name]):
            read(path)
    else:
        read(path)
    if path.name in ("record.gguf", "longrope.gguf"):
        assert read_scaling(path).long_factor == (1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_short_run_finds_nothing(readers: ModuleType, tmp_path: Path, kind: str) -> None:
    assert readers.fuzz(kind, 0, 60, tmp_path) is None


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_planted_bug_is_found_and_made_small(
    readers: ModuleType, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = readers.CHECKS[kind]

    def with_bug(path: Path) -> None:
        check(path)
        if path.stat().st_size % 2:
            raise IndexError("planted")

    monkeypatch.setitem(readers.CHECKS, kind, with_bug)
    raw = readers.fuzz(kind, 0, 400, tmp_path)
    assert raw is not None
    assert "IndexError: planted" in capsys.readouterr().err
    with pytest.raises(IndexError):
        readers.run_one(kind, tmp_path / f"again.{kind}", raw)


@pytest.mark.parametrize("message", ["two\nlines", "x" * 3000])
def test_an_unreadable_error_is_a_finding(readers: ModuleType, message: str) -> None:
    def fail() -> None:
        raise InputFileError(message)

    with pytest.raises(AssertionError):
        readers.only_our_errors(fail)
    readers.only_our_errors(lambda: None)


def test_a_run_of_the_program_writes_what_it_found(
    readers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert readers.main(["--minutes", "0", "--examples", "5", "--kind", "gguf"]) == 0
    assert "5 files, nothing but our own errors" in capsys.readouterr().out

    def broken(path: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setitem(readers.CHECKS, "gguf", broken)
    monkeypatch.setattr(readers, "CORPUS", tmp_path / "corpus")
    monkeypatch.setattr(readers, "seeds", lambda kind: [b"GGUF"])
    assert readers.main(["--minutes", "0", "--examples", "5", "--kind", "gguf"]) == 1
    assert len(list(tmp_path.glob("crash-*.gguf"))) == 1
