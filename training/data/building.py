"""Texts into a `TokenStore`, once: a finished store of the same sources, tokenizer and options is used again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from longrope_export.errors import InputFileError, OutputError, TextTooShortError
from longrope_export.files import atomic_folder
from longrope_export.training.data.encoding import (
    Ends,
    document_ends,
    encode_all,
    tokenizer_fingerprint,
    vocabulary_size,
)
from longrope_export.training.data.shards import ENTRY, FORMAT, INDEX, RECORD, TOKEN_TYPES, TokenStore, shard_name
from longrope_export.training.data.texts import Source, find_sources

# A shard is begun when the last one holds this many tokens: 1 GiB of uint32.
SHARD_TOKENS = 1 << 28
# Texts are encoded together up to this many characters.
BATCH_CHARACTERS = 1 << 20
# A build writes more often than this; what is older was left by one that was killed.
LEFTOVER_SECONDS = 3600

Report = Callable[[int, int], None]


def prepare(
    paths: Iterable[str | os.PathLike[str]],
    tokenizer: Any,
    folder: str | os.PathLike[str],
    *,
    field: str = "text",
    bos: str = "auto",
    eos: str = "auto",
    report: Report | None = None,
) -> TokenStore:
    """The tokenised documents of `paths`, from a folder inside `folder` named after all that decides them.

    A finished one is opened, anything else is made anew beside it and renamed; `report(bytes read, all bytes)` is called
    on the way. Raises `InputFileError` for texts that cannot be read, `TextTooShortError` when there is no text at all,
    `OutputError` when the system refuses a write.
    """
    sources = find_sources(paths)
    seen = [_signature(source) for source in sources]
    ends = document_ends(tokenizer, bos, eos)
    identity = _identity(sources, tokenizer, field, ends)
    target = Path(folder) / hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    if found := _finished(target):
        return found
    _remove_leftovers(Path(folder))
    try:
        with atomic_folder(target) as partial:
            _write(partial, sources, tokenizer, field, ends, identity, report or (lambda done, everything: None))
            _check_unchanged(sources, seen)
    except OutputError:
        # Another process may have finished the same store first.
        if found := _finished(target):
            return found
        raise
    return TokenStore(target)


def _identity(sources: Sequence[Source], tokenizer: Any, field: str, ends: Ends) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "sources": [{"kind": source.kind, "sha256": source.sha256()} for source in sources],
        "field": field if any(source.kind != "text" for source in sources) else None,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "front": list(ends.front),
        "back": list(ends.back),
    }


def _finished(target: Path) -> TokenStore | None:
    """The store in `target`; what is there but cannot be used is removed."""
    if not target.exists():
        return None
    try:
        return TokenStore(target)
    except InputFileError:
        shutil.rmtree(target, ignore_errors=True)
        return None


def _remove_leftovers(folder: Path) -> None:
    for partial in folder.glob(".*.partial"):
        files = [partial, *partial.iterdir()] if partial.is_dir() else []
        if files and time.time() - max(file.stat().st_mtime for file in files) > LEFTOVER_SECONDS:
            shutil.rmtree(partial, ignore_errors=True)


def _signature(source: Source) -> list[tuple[str, int, int]]:
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.files()]


def _check_unchanged(sources: Sequence[Source], seen: Sequence[list[tuple[str, int, int]]]) -> None:
    for source, before in zip(sources, seen):
        if _signature(source) != before:
            raise InputFileError(f"{source.path} changed while it was read; run again")


def _write(
    folder: Path,
    sources: Sequence[Source],
    tokenizer: Any,
    field: str,
    ends: Ends,
    identity: dict[str, Any],
    report: Report,
) -> None:
    vocabulary = vocabulary_size(tokenizer)
    everything, done = sum(source.size for source in sources), 0
    with _Writer(folder, vocabulary) as writer:
        for number, source in enumerate(sources):
            for batch in _batches(source, field):
                for item, ids in zip(batch, encode_all(tokenizer, [item.text for item in batch])):
                    writer.add(np.concatenate([ends.front, ids, ends.back]).astype(np.int64), number, item.number)
                report(done + batch[-1].read, everything)
            done += source.size
            report(done, everything)
    if not writer.documents:
        raise TextTooShortError(f"{sources[0].path if sources else 'the data'} holds no text; give texts to train on")
    record = {
        "format": FORMAT,
        "dtype": writer.dtype,
        "documents": writer.documents,
        "tokens": writer.tokens,
        "shards": writer.shards,
        "vocabulary": vocabulary,
        "sources": [{"path": str(source.path), "kind": source.kind, "size": source.size} for source in sources],
        "identity": identity,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")


def _batches(source: Source, field: str) -> Iterator[list[Any]]:
    batch, characters = [], 0
    for item in source.items(field):
        batch.append(item)
        characters += len(item.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    """Appends documents to shards and to their index; nothing but the last one is in memory."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
        self.documents = self.tokens = self.shards = 0
        self._folder, self._vocabulary = folder, vocabulary
        self._index = (folder / INDEX).open("wb")
        self._shard: BinaryIO | None = None
        self._in_shard = 0

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_shard()
        _close(self._index)

    def add(self, tokens: npt.NDArray[np.int64], source: int, item: int) -> None:
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self._vocabulary:
            raise InputFileError(f"the tokenizer gave token {tokens.max()}, which is not in its vocabulary")
        data = tokens.astype(TOKEN_TYPES[self.dtype]).tobytes()
        shard = self._room()
        digest = hashlib.blake2b(tokens.astype("<u4").tobytes(), digest_size=8).digest()
        entry = (self.shards - 1, source, self._in_shard, len(tokens), item, int.from_bytes(digest, "little"))
        shard.write(data)
        self._index.write(np.array([entry], ENTRY).tobytes())
        self._in_shard += len(tokens)
        self.tokens += len(tokens)
        self.documents += 1

    def _room(self) -> BinaryIO:
        """The open shard; a full one is closed, and the next begun."""
        if self._in_shard >= SHARD_TOKENS:
            self._close_shard()
        if self._shard is None:
            self._shard = (self._folder / shard_name(self.shards)).open("wb")
            self.shards += 1
        return self._shard

    def _close_shard(self) -> None:
        if self._shard is not None:
            _close(self._shard)
        self._shard, self._in_shard = None, 0


def _close(file: BinaryIO) -> None:
    """On the disk before the folder's manifest says so."""
    with file:
        file.flush()
        os.fsync(file.fileno())
