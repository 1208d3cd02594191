"""The documents of a search: disjoint rows for searching and for validating, at the long and at the short length."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from longrope_export.errors import TextTooShortError
from longrope_export.search.protocol import SEARCH, SHORT_SEARCH, SHORT_VALIDATION, VALIDATION

Row = npt.NDArray[np.int64]
Parts = dict[str, tuple[Row, ...]]

# Pieces of window length that the short search cuts from each document.
SHORT_PIECES = 4


def split_rows(
    rows: Sequence[npt.ArrayLike], *, documents: int, validation: int, window: int, target: int, bos: int | None
) -> Parts:
    """The first `documents` rows to search on, the next `validation` rows to choose on, each `target` tokens long.

    The short parts are up to `SHORT_PIECES` pieces of `window` tokens of each, with BOS in front where the row has it.
    Raises `TextTooShortError` when rows are missing or too short.
    """
    needed = documents + validation
    arrays = [np.asarray(row, dtype=np.int64).ravel()[:target] for row in rows[:needed]]
    if len(arrays) < needed:
        raise TextTooShortError(
            f"{len(arrays)} documents were given; {documents} to search on and {validation} to validate on are needed"
        )
    for index, row in enumerate(arrays):
        if len(row) < target:
            raise TextTooShortError(
                f"document {index + 1} has {len(row):,} tokens; {target:,} are needed: give longer texts"
            )
    search, held = tuple(arrays[:documents]), tuple(arrays[documents:])
    return {
        SEARCH: search,
        VALIDATION: held,
        SHORT_SEARCH: tuple(piece for row in search for piece in short_pieces(row, window, bos)),
        SHORT_VALIDATION: tuple(piece for row in held for piece in short_pieces(row, window, bos)),
    }


def short_pieces(row: Row, window: int, bos: int | None) -> list[Row]:
    """Evenly spaced disjoint pieces of `window` tokens of a row, each beginning with BOS where the row does."""
    with_bos = bos is not None and int(row[0]) == bos
    body = row[1:] if with_bos else row
    length = window - 1 if with_bos else window
    count = min(SHORT_PIECES, len(body) // length)
    stride = len(body) // count
    front = row[:1] if with_bos else row[:0]
    return [np.concatenate([front, body[index * stride : index * stride + length]]) for index in range(count)]


def rows_hash(parts: Mapping[str, Sequence[Row]]) -> str:
    """Hex SHA-256 over the token ids of the search and validation rows, in order."""
    digest = hashlib.sha256()
    for name in (SEARCH, VALIDATION):
        for row in parts[name]:
            digest.update(len(row).to_bytes(8, "little"))
            digest.update(row.astype("<i8").tobytes())
    return digest.hexdigest()
