"""The documents of a search: disjoint rows for searching and for validating, at the long and at the short length."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from longrope_export.errors import TextTooShortError
from longrope_export.search.mixture import Document, Row, plain
from longrope_export.search.protocol import SEARCH, SHORT_SEARCH, SHORT_VALIDATION, VALIDATION

Parts = dict[str, tuple[Document, ...]]

# Documents that nothing is chosen on: measured once, at the end.
REPORT = "report"

# What the early steps of a descent search on, `@` its length.
EARLY = f"early-{SEARCH}"

# Pieces of window length that the short search cuts from each document.
SHORT_PIECES = 4


def early(length: int) -> str:
    """Name of the part that the early steps of a descent search on: pieces of `length` tokens."""
    return f"{EARLY}@{length}"


def in_between(length: int) -> tuple[str, str]:
    """Names of the parts to search on and to choose on at a length between L and L'."""
    return f"{SEARCH}@{length}", f"{VALIDATION}@{length}"


def split_rows(
    rows: Sequence[npt.ArrayLike],
    *,
    documents: int,
    validation: int,
    window: int,
    target: int,
    bos: int | None,
    report: int = 0,
    lengths: Sequence[int] = (),
    early_length: int | None = None,
) -> dict[str, tuple[Row, ...]]:
    """The first `documents` rows to search on, then `validation` to choose on and `report`, each `target` tokens long.

    The short parts are up to `SHORT_PIECES` pieces of `window` tokens of each, with BOS in front where the row has it;
    the parts of a length in between are the rows' beginnings, that of `early_length` holds all their pieces. Raises
    `TextTooShortError` when rows are missing or too short.
    """
    needed = documents + validation + report
    arrays = [np.asarray(row, dtype=np.int64).ravel()[:target] for row in rows[:needed]]
    if len(arrays) < needed:
        raise TextTooShortError(
            f"{len(arrays)} documents were given; {documents} to search on, {validation} to validate on and {report} to "
            "report on are needed"
        )
    for index, row in enumerate(arrays):
        if len(row) < target:
            raise TextTooShortError(
                f"document {index + 1} has {len(row):,} tokens; {target:,} are needed: give longer texts"
            )
    search, held = tuple(arrays[:documents]), tuple(arrays[documents : documents + validation])
    parts = {
        SEARCH: search,
        VALIDATION: held,
        REPORT: tuple(arrays[documents + validation :]),
        SHORT_SEARCH: tuple(piece for row in search for piece in pieces_of(row, window, bos, SHORT_PIECES)),
        SHORT_VALIDATION: tuple(piece for row in held for piece in pieces_of(row, window, bos, SHORT_PIECES)),
    }
    for length in lengths:
        parts |= zip(in_between(length), (tuple(row[:length] for row in each) for each in (search, held)))
    if early_length:
        most = target // early_length
        parts[early(early_length)] = tuple(piece for row in search for piece in pieces_of(row, early_length, bos, most))
    return parts


def with_plain_losses(parts: Mapping[str, Sequence[Row]]) -> Parts:
    """Every row as a document whose loss is the mean over its tokens."""
    return {part: tuple(plain(row) for row in rows) for part, rows in parts.items()}


def pieces_of(row: Row, tokens: int, bos: int | None, most: int) -> list[Row]:
    """Up to `most` evenly spaced disjoint pieces of `tokens` tokens of a row, each beginning with BOS where it does."""
    with_bos = bos is not None and int(row[0]) == bos
    body = row[1:] if with_bos else row
    length = tokens - 1 if with_bos else tokens
    count = min(most, len(body) // length)
    stride = len(body) // count
    front = row[:1] if with_bos else row[:0]
    return [np.concatenate([front, body[index * stride : index * stride + length]]) for index in range(count)]


def documents_hash(parts: Mapping[str, Sequence[Document]]) -> str:
    """Hex SHA-256 over tokens and weights of the documents at the long length, in order."""
    digest = hashlib.sha256()
    for piece in (piece for name in (SEARCH, VALIDATION, REPORT) for each in parts.get(name, ()) for piece in each):
        digest.update(len(piece.token_ids).to_bytes(8, "little"))
        digest.update(piece.token_ids.astype("<i8").tobytes())
        digest.update(piece.weights.astype("<f8").tobytes())
    return digest.hexdigest()
