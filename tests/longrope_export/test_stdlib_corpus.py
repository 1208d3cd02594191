"""The corpus of the standard library: disjoint splits, long enough documents, hashes of the real files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from longrope_export.errors import InputFileError
from longrope_export.evaluation.stdlib_corpus import HELD_OUT, Split, documents, file_hashes, training_tests

SPLITS: tuple[Split, ...] = ("train", "search", "validation", "report")
# Rough, for a vocabulary of 3,072; the exact lengths are checked where the tokenizer is (tests/training).
CHARACTERS_PER_TOKEN = 3.2


@pytest.fixture(scope="module")
def library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


@pytest.fixture
def small_library(tmp_path: Path) -> Path:
    files = {
        "argparse.py": "ARGPARSE = 1\n", "asyncio/__init__.py": "one\n", "asyncio/base.py": "two\r\n", "abc.py": "abc\n",
        "ast.py": "ast\n", "typing.py": "typing\n", "encodings/cp037.py": "table\n", "_sysconfigdata_x.py": "paths\n",
        "unittest/case.py": "case\n", "unittest/test/test_case.py": "no\n", "site-packages/other.py": "no\n",
        "test/test_argparse.py": "no\n", "test/test_asyncio/test_events.py": "no\n", "test/test_abc.py": "test of abc\n",
        "test/test_typing_extra.py": "no\n",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (tmp_path / "broken.py").write_bytes(b"x = '\xff'\n")
    return tmp_path


def test_no_text_is_in_two_splits() -> None:
    names = [name for split in HELD_OUT.values() for name in split]
    assert len(names) == len(set(names))
    hashes = [document.sha256 for split in SPLITS for document in documents(split)]
    hashes += [document.sha256 for document in training_tests()]
    held_out = [document.sha256 for split in SPLITS[1:] for document in documents(split)]
    assert all(hashes.count(one) == 1 for one in held_out)


@pytest.mark.parametrize(("split", "count"), [("search", 8), ("validation", 4), ("report", 16)])
def test_held_out_splits_have_enough_long_documents(split: Split, count: int) -> None:
    lengths = sorted((len(d.text) / CHARACTERS_PER_TOKEN for d in documents(split)), reverse=True)
    assert lengths[count - 1] >= 2200
    assert lengths[1] >= 16 * 1024 * 1.1


def test_every_held_out_module_exists_here() -> None:
    for split in SPLITS[1:]:
        assert {document.name for document in documents(split)} == set(HELD_OUT[split])


def test_a_package_is_one_document_in_the_order_of_its_paths(small_library: Path) -> None:
    argparse, asyncio = documents("report", library=small_library)
    assert (asyncio.name, asyncio.text) == ("asyncio", "one\n\ntwo\n")
    assert asyncio.sha256 == hashlib.sha256(b"one\n\ntwo\n").hexdigest()
    assert (argparse.name, argparse.text) == ("argparse", "ARGPARSE = 1\n")


def test_training_leaves_out_held_out_modules_tests_and_tables(small_library: Path) -> None:
    train = {document.name: document.text for document in documents("train", library=small_library)}
    assert train == {
        "abc": "abc\n",
        "broken": "x = '\ufffd'\n",
        "latin": "# -*- coding: latin-1 -*-\nx = 'é'\n",
        "unittest": "case\n",
    }
    assert [d.name for d in training_tests(small_library)] == ["test/test_abc.py"]


def test_short_documents_can_be_left_out(small_library: Path) -> None:
    chosen = documents("report", min_tokens=10, tokenize_text=lambda text: list(text.encode()), library=small_library)
    assert [document.name for document in chosen] == ["argparse"]
    with pytest.raises(ValueError, match="tokenize_text"):
        documents("report", min_tokens=10, library=small_library)


def test_hashes_are_those_of_the_files(small_library: Path, library: Path) -> None:
    assert file_hashes("report", small_library) == {
        "argparse.py": hashlib.sha256(b"ARGPARSE = 1\n").hexdigest(),
        "asyncio/__init__.py": hashlib.sha256(b"one\n").hexdigest(),
        "asyncio/base.py": hashlib.sha256(b"two\r\n").hexdigest(),
    }
    everywhere = file_hashes("validation")
    assert everywhere["typing.py"] == hashlib.sha256((library / "typing.py").read_bytes()).hexdigest()


def test_an_interpreter_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no Python source files"):
        documents("report", library=tmp_path)


def test_the_corpus_needs_no_torch() -> None:
    script = (
        "import sys, longrope_export.evaluation.stdlib_corpus, longrope_export.demo; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
