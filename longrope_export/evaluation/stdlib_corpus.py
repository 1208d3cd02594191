"""Python's own standard library as a corpus: long documents that every machine has, in four disjoint splits.

A document is one top-level module, or all modules of one top-level package joined in the order of their paths.
The held-out splits are explicit lists of modules that CPython 3.11 to 3.14 ship (also in distributions that leave out
the test suite, IDLE or Tk); everything else is training text. The tests of a held-out module are in no split.
"""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longrope_export.errors import InputFileError
from longrope_export.files import sha256

Split = Literal["train", "search", "validation", "report"]

HELD_OUT: dict[str, tuple[str, ...]] = {
    "search": (
        "ast", "bdb", "dataclasses", "dis", "fileinput", "imaplib", "inspect", "logging", "mailbox", "optparse", "pdb",
        "pickle", "platform", "pstats", "sched", "selectors", "socketserver", "subprocess", "tempfile", "timeit",
        "urllib", "weakref",
    ),
    "validation": (
        "codecs", "doctest", "ftplib", "plistlib", "traceback", "typing", "wsgiref", "xmlrpc",
    ),
    "report": (
        "argparse", "asyncio", "bz2", "calendar", "cmd", "configparser", "csv", "difflib", "email", "filecmp",
        "fractions", "gettext", "heapq", "http", "ipaddress", "json", "queue", "random", "shutil", "smtplib",
        "statistics", "tarfile", "textwrap", "threading", "uuid", "zipfile",
    ),
}  # fmt: skip

# Tables of code points and build settings: long, and nothing like a program.
_SKIPPED_TOP_LEVEL = ("site-packages", "dist-packages", "encodings", "__pycache__")
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")
_TEST_FOLDERS = ("test", "tests", "idle_test")


@dataclass(frozen=True)
class Document:
    """A text with its name and the SHA-256 of its UTF-8 bytes (newlines as `\\n`)."""

    name: str
    text: str
    sha256: str


def documents(
    split: Split,
    *,
    min_tokens: int = 0,
    tokenize_text: Callable[[str], Sequence[int]] | None = None,
    library: Path | None = None,
) -> list[Document]:
    """The documents of one split in the order of their names, without those shorter than `min_tokens`.

    `tokenize_text` (text → token ids) is needed with `min_tokens`; `library` is another standard library's folder than
    the running interpreter's. Raises `InputFileError` when the library's source files are not there.
    """
    folder = library or Path(sysconfig.get_path("stdlib"))
    found = [_document(name, files) for name, files in sorted(_sources(folder, split).items())]
    if not found:
        raise InputFileError(f"{folder} holds no Python source files; use an interpreter that ships its library")
    if min_tokens and tokenize_text is None:
        raise ValueError("min_tokens needs tokenize_text")
    return [d for d in found if not min_tokens or len(tokenize_text(d.text)) >= min_tokens]  # type: ignore[misc]


def file_hashes(split: Split, library: Path | None = None) -> dict[str, str]:
    """SHA-256 of every source file of a split (its bytes, as `sha256sum` gives it) by path inside the library."""
    folder = library or Path(sysconfig.get_path("stdlib"))
    files = (file for files in _sources(folder, split).values() for file in files)
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def training_tests(library: Path | None = None) -> list[Document]:
    """The library's own test suite, one document a file, without the tests of held-out modules; may be empty."""
    folder = (library or Path(sysconfig.get_path("stdlib"))) / "test"
    held_out = {name for names in HELD_OUT.values() for name in names}
    files = [file for file in sorted(folder.rglob("*.py")) if not _tests_of(file.relative_to(folder)) & held_out]
    return [_document(f"test/{file.relative_to(folder).as_posix()}", [file]) for file in files]


def _sources(folder: Path, split: Split) -> dict[str, list[Path]]:
    split_of = {name: chosen for chosen, names in HELD_OUT.items() for name in names}
    entries = (entry for entry in sorted(folder.iterdir()) if not _skipped(entry.name)) if folder.is_dir() else ()
    named = ((entry.name.removesuffix(".py"), entry) for entry in entries)
    found = {name: _files(entry) for name, entry in named if split_of.get(name, "train") == split}
    return {name: files for name, files in found.items() if files}


def _skipped(name: str) -> bool:
    return name in _SKIPPED_TOP_LEVEL or name in _TEST_FOLDERS or name.startswith(_SKIPPED_PREFIXES)


def _files(entry: Path) -> list[Path]:
    """The Python files of a module or package, without its tests, in an order that every system agrees on."""
    if not entry.is_dir():
        return [entry] if entry.suffix == ".py" else []
    files = (file.relative_to(entry) for file in entry.rglob("*.py"))
    return [entry / file for file in sorted(files, key=Path.as_posix) if not set(file.parts[:-1]) & set(_TEST_FOLDERS)]


def _tests_of(file: Path) -> set[str]:
    """Names of modules that a file of the test suite may be about: test_csv.py, test_asyncio/…, mp_tests.py → csv, asyncio, …."""
    words = {part.removesuffix(".py").removeprefix("test_") for part in file.parts}
    return words | {word.split("_")[0] for word in words}


def _document(name: str, files: Sequence[Path]) -> Document:
    text = "\n".join(_read(file) for file in files)
    return Document(name, text, hashlib.sha256(text.encode()).hexdigest())


def _read(file: Path) -> str:
    """The file's text by its declared encoding; undecodable bytes (some tests have them on purpose) are replaced."""
    try:
        with tokenize.open(file) as source:
            return source.read()
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return file.read_text(encoding="utf-8", errors="replace")
