"""Tokenised documents on disk: memory-mapped shards, an index of the documents, and what they were made from."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import InputFileError
from longrope_export.files import MANIFEST

FORMAT = "longrope-tokens/1"
RECORD, INDEX = "store.json", "documents.bin"

# One entry per document: where its tokens stand, and which item of which source they came from. `hash` is of the
# tokens, so that the same document gets the same one wherever it stands.
ENTRY = np.dtype([("shard", "<u4"), ("source", "<u4"), ("start", "<u8"), ("length", "<u8"), ("item", "<u8"),
                  ("hash", "<u8")])  # fmt: skip
TOKEN_TYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"tokens-{number:05}.bin"


class TokenStore:
    """Documents of token ids in a finished folder, BOS and EOS included; only what is read comes into memory.

    Pickles as its folder, so that workers map the same files. Raises `InputFileError` when the folder is not finished
    or its files do not fit one another.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._sizes = _sizes(self.folder)
        self.record = _read_record(self.folder)
        self._type = TOKEN_TYPES[self.record["dtype"]]
        index = _map(self.folder / INDEX, ENTRY)
        self._check(index)
        self._index = index
        self.lengths: npt.NDArray[np.int64] = index["length"].astype(np.int64)

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return TokenStore, (self.folder,)

    def __len__(self) -> int:
        return len(self._index)

    @property
    def tokens(self) -> int:
        """Number of tokens of all documents together."""
        return int(self.lengths.sum())

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides the tokens: sources by hash, tokenizer, options; JSON-ready, for a record that names changes."""
        identity: Mapping[str, Any] = self.record["identity"]
        return identity

    @functools.cached_property
    def data_hash(self) -> str:
        """Hex SHA-256: equal exactly when the same tokens stand in the same documents in the same order."""
        manifest = json.loads((self.folder / MANIFEST).read_text())["files"]
        sums = [manifest[shard_name(number)]["sha256"] for number in range(self.record["shards"])]
        return hashlib.sha256("".join(sums).encode() + self.lengths.astype("<i8").tobytes()).hexdigest()

    @property
    def hashes(self) -> npt.NDArray[np.uint64]:
        """uint64 [documents]: equal for documents of the same tokens."""
        return np.asarray(self._index["hash"])

    def name(self, document: int) -> str:
        """Where a document came from: `book.txt`, `data.jsonl:17`, `folder[16]`."""
        entry = self._index[document]
        source = self.record["sources"][int(entry["source"])]
        return document_name(source["path"], source["kind"], int(entry["item"]))

    def read(self, document: int, start: int = 0, length: int | None = None) -> npt.NDArray[np.int64]:
        """Token ids int64 [length] of a document from `start` on, by default up to its end."""
        entry = self._index[document]
        end = int(entry["length"]) if length is None else start + length
        if not 0 <= start <= end <= int(entry["length"]):
            raise IndexError(f"tokens {start}..{end} of document {document}, which has {int(entry['length'])}")
        first = int(entry["start"])
        return self._shard(int(entry["shard"]))[first + start : first + end].astype(np.int64)

    @functools.cached_property
    def _maps(self) -> dict[int, npt.NDArray[Any]]:
        return {}

    def _shard(self, number: int) -> npt.NDArray[Any]:
        if number not in self._maps:
            self._maps[number] = _map(self.folder / shard_name(number), self._type)
        return self._maps[number]

    def _check(self, index: npt.NDArray[Any]) -> None:
        """Every entry lies inside a shard that is there: slices would silently come out shorter."""
        room = np.array(
            [self._sizes.get(shard_name(number), 0) // self._type.itemsize for number in range(self.record["shards"])],
            dtype=np.uint64,
        )
        wrong = len(index) != self.record["documents"] or index["source"].max(initial=0) >= len(self.record["sources"])
        wrong = wrong or index["shard"].max(initial=0) >= len(room)
        if not wrong:
            limits = room[index["shard"]]
            wrong = bool(((index["length"] > limits) | (index["start"] > limits - index["length"])).any())
        if wrong:
            raise InputFileError(f"{self.folder / INDEX} does not fit its shards; remove {self.folder} and run again")


def document_name(path: str, kind: str, item: int) -> str:
    """Where item `item` of a source stands, as an error or a listing names it."""
    if kind == "jsonl":
        return f"{path}:{item}"
    if kind == "dataset":
        return f"{path}[{item}]"
    return path if item == 0 else f"{path}#{item + 1}"


def _sizes(folder: Path) -> dict[str, int]:
    """File → bytes as the manifest has them, each compared with the file."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        sizes = {str(name): int(entry["size"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InputFileError(
            f"{folder} has no readable {MANIFEST}: it was not finished; prepare the data again"
        ) from None
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            raise InputFileError(f"{file} is missing or has another size; remove {folder} and run again")
    return sizes


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
        known = record["format"] == FORMAT and record["dtype"] in TOKEN_TYPES
        known = known and isinstance(record["identity"], dict)
        known = known and all(isinstance(record[name], int) for name in ("documents", "shards"))
        known = known and all(isinstance(source["path"], str) for source in record["sources"])
    except (OSError, ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise InputFileError(f"{folder / RECORD} is not a {FORMAT} record; remove {folder} and run again")
    return record


def _map(path: Path, kind: np.dtype[Any]) -> npt.NDArray[Any]:
    size = path.stat().st_size if path.is_file() else -1
    if size < 0 or size % kind.itemsize:
        raise InputFileError(f"{path} is missing or cut off; remove {path.parent} and run again")
    # An empty file cannot be mapped.
    return np.memmap(path, dtype=kind, mode="r") if size else np.empty(0, kind)
