"""Texts to measure on: files read as UTF-8, tokenised by the model's tokenizer, cut into rows of equal length."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import InputFileError, TextTooShortError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer_json

_LOG = logging.getLogger(__name__)
# A larger file is read up to its last line break before this many bytes: that is more text than any run reads.
MAX_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Row:
    """One row to measure: `token_ids` int64 [length], BOS included, and the file (and piece) that it comes from."""

    name: str
    token_ids: npt.NDArray[np.int64]


def find_text_files(
    paths: Iterable[str | os.PathLike[str]], *, whole: Callable[[Path], bool] = lambda folder: False
) -> list[Path]:
    """Files meant by `paths`: files as they are, folders recursively in the order of their names.

    Hidden files and `__pycache__` are left out of folders. A folder for which `whole` is true is listed itself instead
    of its files. Raises `InputFileError` for a missing path and for a folder without files.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = list(_inside(path, whole))
            if not inside:
                raise InputFileError(f"{path} holds no text files; name a file or another folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputFileError(f"{path} does not exist; name a text file or a folder of them")
    return found


def _inside(folder: Path, whole: Callable[[Path], bool]) -> Iterator[Path]:
    if whole(folder):
        yield folder
        return
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == "__pycache__":
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():  # a link to a folder above would have no end
            yield from _inside(path, whole)


def read_text(path: Path) -> str:
    """Text of a UTF-8 file, up to `MAX_BYTES`; line ends become `\\n`.

    Raises `InputFileError` when the file cannot be read or is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
            if file.read(1):
                data = data[: data.rfind(b"\n") + 1 or None]
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from None
    return decode_text(data, path)


def decode_text(data: bytes, path: Path, *, offset: int = 0, lines: int = 0) -> str:
    """Text of `data`, which stands behind `offset` bytes and `lines` lines of the file `path`; line ends become `\\n`.

    Raises `InputFileError` when it is not UTF-8 text.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = lines + data.count(b"\n", 0, error.start) + 1
        place = f"line {line}, byte {offset + error.start}"
        raise InputFileError(f"{path} is not UTF-8 text ({place}); convert it or leave it out of the texts") from None
    if "\0" in text:
        raise InputFileError(f"{path} is a binary file (it has NUL characters); leave it out of the texts")
    return text.replace("\r\n", "\n")


def load_tokenizer(model: str | os.PathLike[str]) -> Any:
    """Tokenizer of an HF folder or a GGUF file, without loading weights.

    Raises `InputFileError` when the path has no tokenizer that transformers can read.
    """
    from transformers import AutoTokenizer

    path = Path(model)
    if not path.exists():
        raise InputFileError(f"{path} does not exist; name a model folder or a GGUF file")
    try:
        if path.is_file():
            tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
            correct_pre_tokenizer(tokenizer, str(read_gguf_header(path).get("tokenizer.ggml.pre")))
            return tokenizer
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputFileError(f"{path} has no tokenizer that transformers can read: {reason}") from error


def correct_pre_tokenizer(tokenizer: Any, name: str) -> None:
    """Split text as llama.cpp's pre-tokenizer `name` does; an unknown name changes nothing.

    transformers' GGUF import takes GPT-2's whatever the file says, so that 123 stays one piece where the model learned
    digits.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import BPE

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or name not in PRE_TOKENIZERS or not isinstance(backend.model, BPE):
        return
    values = {"pre_tokenizer": pre_tokenizer_json(name), "model": {"type": "BPE", "vocab": {}, "merges": []}}
    backend.pre_tokenizer = Tokenizer.from_str(json.dumps(values)).pre_tokenizer
    backend.model.ignore_merges = PRE_TOKENIZERS[name].ignore_merges


# How a tokenizer is called for plain text: nothing is added, and `<s>` in the text is three characters, no control.
PLAIN_TEXT = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` as plain text."""
    return list(tokenizer(text, **PLAIN_TEXT)["input_ids"])


def bos_ids(tokenizer: Any) -> list[int]:
    """`[BOS]` when the tokenizer defines a BOS token, else nothing: the start of every row."""
    return [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]


def evaluation_rows(
    paths: Sequence[str | os.PathLike[str]],
    tokenizer: Any,
    length: int,
    documents: int | None = None,
    *,
    at_most: int | None = None,
    least: int | None = None,
) -> list[Row]:
    """Rows of exactly `length` tokens from text files and folders, each read once; see `rows_from_texts`."""
    texts = ((str(path), read_text(path)) for path in distinct_files(paths))
    return rows_from_texts(texts, tokenizer, length, documents, at_most=at_most, least=least)


def distinct_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """`find_text_files`, but a file that is meant twice is there once."""
    files: dict[Path, Path] = {}
    for path in find_text_files(paths):
        files.setdefault(path.resolve(), path)
    return list(files.values())


def rows_from_texts(
    texts: Iterable[tuple[str, str]],
    tokenizer: Any,
    length: int,
    documents: int | None = None,
    *,
    at_most: int | None = None,
    least: int | None = None,
) -> list[Row]:
    """Rows `[BOS if the tokenizer has one] + tokens`, each exactly `length` tokens, from (name, text) pairs.

    Every text that is long enough gives its beginning, in the given order; when that is fewer than
    `documents`, second pieces follow in the same order, then third ones: pieces of one text are consecutive
    and disjoint. With `least`, fewer than `documents` will do. Without `documents`, one row per text that is long
    enough, `at_most` many. Texts that are too short are passed over, and so are rows that are there already, with a
    warning: what is searched on must not choose, and what is counted twice seems surer than it is. Raises
    `TextTooShortError`, naming the longest text and its tokens, when the rows do not suffice.
    """
    if length < 2 or (documents is not None and documents < 1):
        raise TextTooShortError(f"{documents} documents of {length} tokens: at least 1 of 2 tokens is needed")
    bos = bos_ids(tokenizer)
    body = length - len(bos)
    enough, each = documents or at_most, documents or 1
    pieces: list[list[Row]] = []
    seen: dict[bytes, str] = {}
    repeats: list[str] = []
    longest, most = "the data", 0
    for name, text in texts:
        ids = encode(tokenizer, text)
        if len(ids) + len(bos) > most:
            longest, most = name, len(ids) + len(bos)
        if rows := _different(itertools.islice(_pieces(name, ids, bos, body), each), seen, repeats):
            pieces.append(rows)
        if enough is not None and len(pieces) >= enough:
            break
    if repeats:
        _LOG.warning("rows that repeat others are left out: %s (%d in all)", repeats[0], len(repeats))
    rows = _round_robin(pieces)[:documents]
    needed = least or documents or 1
    if len(rows) < needed:
        raise TextTooShortError(_too_short(len(rows), length, needed, longest, most))
    return rows


def _pieces(name: str, ids: list[int], bos: list[int], body: int) -> Iterator[Row]:
    for number, start in enumerate(range(0, len(ids) - body + 1, body), 1):
        yield Row(name if number == 1 else f"{name}#{number}", np.array(bos + ids[start : start + body]))


def _different(rows: Iterable[Row], seen: dict[bytes, str], repeats: list[str]) -> list[Row]:
    """Those of `rows` that are not in `seen`, which gets them by name; `repeats` gets a word on the others."""
    kept = []
    for row in rows:
        digest = row_digest(row.token_ids)
        if digest in seen:
            repeats.append(f"{row.name} is the same as {seen[digest]}")
        else:
            seen[digest] = row.name
            kept.append(row)
    return kept


def _round_robin(pieces: list[list[Row]]) -> list[Row]:
    rounds = itertools.zip_longest(*pieces)
    return [row for turn in rounds for row in turn if row is not None]


def _too_short(rows: int, length: int, documents: int | None, longest: str, most: int) -> str:
    if rows == 0:
        return (
            f"{longest} has {most:,} tokens and is the longest text; {length:,} are needed: give a longer text "
            "or ask for a shorter length"
        )
    return (
        f"the texts give {rows} rows of {length:,} tokens and {documents} documents were asked for (the longest, "
        f"{longest}, has {most:,} tokens): give more text or ask for fewer documents"
    )


def data_hash(rows: Sequence[Row]) -> str:
    """Hex SHA-256 over the rows' token ids: equal exactly when the same tokens are measured in the same order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row.token_ids).to_bytes(8, "little"))
        digest.update(row.token_ids.astype("<i8").tobytes())
    return digest.hexdigest()


def row_digest(token_ids: npt.NDArray[np.int64]) -> bytes:
    """SHA-256 of one row's token ids: equal exactly when the rows are."""
    return hashlib.sha256(token_ids.astype("<i8").tobytes()).digest()


def iter_ids(rows: Sequence[Row | npt.ArrayLike]) -> Iterator[npt.NDArray[np.int64]]:
    """Token ids of each row, int64 [length], for `Row`s and for plain lists alike."""
    for row in rows:
        yield np.asarray(row.token_ids if isinstance(row, Row) else row, dtype=np.int64)
