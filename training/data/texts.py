"""The documents of text files, folders, JSONL files and datasets on disk, read as a stream."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError, MissingDependencyError
from longrope_export.evaluation.documents import MAX_BYTES, decode_text, find_text_files
from longrope_export.files import folder_sha256, sha256
from longrope_export.training.data.shards import document_name

JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Item:
    """One document of a source: its number there, its text, and how many bytes of the source lie behind its end."""

    number: int
    text: str
    read: int


@dataclass(frozen=True)
class Source:
    """A file, or the folder of a dataset, that holds documents; `kind` is a name in `READERS`, `size` in bytes."""

    path: Path
    kind: str
    size: int

    def items(self, field: str) -> Iterator[Item]:
        """Documents that are not empty, in order, one in memory at a time; raises `InputFileError` naming the place."""
        with _reading(self.path):
            yield from (item for item in READERS[self.kind](self, field) if item.text)

    def name(self, item: int) -> str:
        """Where a document stands."""
        return document_name(str(self.path), self.kind, item)

    def files(self) -> list[Path]:
        """The files that hold the source."""
        return (
            sorted(path for path in self.path.rglob("*") if path.is_file()) if self.kind == "dataset" else [self.path]
        )

    def sha256(self) -> str:
        """Hex SHA-256 of the file; of a dataset, of its files' names and sums."""
        with _reading(self.path):
            return folder_sha256(self.path) if self.kind == "dataset" else sha256(self.path)


def documents(paths: Iterable[str | os.PathLike[str]], field: str = "text") -> Iterator[tuple[str, str]]:
    """(name, text) of every document of `paths`; JSONL lines and dataset rows have their text in `field`."""
    for source in find_sources(paths):
        for item in source.items(field):
            yield source.name(item.number), item.text


def find_sources(paths: Iterable[str | os.PathLike[str]]) -> list[Source]:
    """Files and datasets meant by `paths`, folders recursively in the order of names.

    `.jsonl` and `.ndjson` are JSONL, every other file is one text. A folder written by `save_to_disk` is a dataset; of
    several splits it is `train`. Raises `InputFileError` for a missing path and for a folder without files.
    """
    return [_source(path) for path in find_text_files(paths, whole=_is_dataset)]


def _source(path: Path) -> Source:
    if not path.is_dir():
        return Source(path, "jsonl" if path.suffix.lower() in JSONL else "text", path.stat().st_size)
    if _has_splits(path):
        path = _training_split(path)
    return Source(path, "dataset", sum(file.stat().st_size for file in path.rglob("*") if file.is_file()))


def _is_dataset(folder: Path) -> bool:
    return _has_splits(folder) or all((folder / name).is_file() for name in ("dataset_info.json", "state.json"))


def _has_splits(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file()


def _training_split(folder: Path) -> Path:
    if _is_dataset(folder / "train"):
        return folder / "train"
    splits = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    raise InputFileError(f"{folder} has no split called train; name the folder of one of its splits ({splits})")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputFileError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_text(source: Source, field: str) -> Iterator[Item]:
    """The file as one document; one of more than `MAX_BYTES` as several, cut at the ends of lines."""
    rest, number, done, lines = b"", 0, 0, 0
    with source.path.open("rb") as file:
        while data := rest + file.read(MAX_BYTES + 1 - len(rest)):
            end = len(data) if len(data) <= MAX_BYTES else _last_cut(data)
            text = decode_text(data[:end], source.path, offset=done, lines=lines)
            done, lines, rest = done + end, lines + data.count(b"\n", 0, end), data[end:]
            yield Item(number, text, done)
            number += 1


def _last_cut(data: bytes) -> int:
    """Where to cut all but the last byte: behind the last line break, else before the last whole character."""
    end = len(data) - 1
    if line := data.rfind(b"\n", 0, end) + 1:
        return line
    # No character has more than three continuing bytes; whatever has more is not UTF-8.
    return next((cut for cut in range(end, end - 4, -1) if data[cut] & 0xC0 != 0x80), end)


def _read_jsonl(source: Source, field: str) -> Iterator[Item]:
    with source.path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_BYTES + 1):
            number += 1
            place = f"{source.path}, line {number}"
            if len(line) > MAX_BYTES:
                raise InputFileError(f"{place} is longer than {MAX_BYTES >> 20} MiB; split the document")
            if line.strip():
                yield Item(number, _checked(_field(line, field, place), place), file.tell())


def _field(line: bytes, field: str, place: str) -> Any:
    try:
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputFileError(f"{place} is not UTF-8 text (byte {error.start}); convert the file") from None
    except (ValueError, RecursionError):
        raise InputFileError(f'{place} is not JSON; each line must be an object such as {{"{field}": …}}') from None
    if not isinstance(value, dict):
        raise InputFileError(f'{place} is not an object; each line must be one such as {{"{field}": …}}')
    if field not in value:
        raise InputFileError(f"{place} has no field {field!r}; name the field of the text ({_names(value)})")
    return value[field]


def _checked(value: Any, place: str) -> str:
    """`value` if it is text that a tokenizer can read."""
    if not isinstance(value, str):
        raise InputFileError(f"{place}: the text is not a string; name another field or leave the line out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputFileError(f"{place}: the text has half a surrogate pair; write the text again as UTF-8") from None
    if "\0" in value:
        raise InputFileError(f"{place}: the text has NUL characters; leave it out of the texts")
    return value.replace("\r\n", "\n")


def _names(names: Iterable[str]) -> str:
    shown = sorted(map(str, names))
    return "it has " + ", ".join(name[:40] for name in shown[:8]) + (" …" if len(shown) > 8 else "")


def _read_dataset(source: Source, field: str) -> Iterator[Item]:
    dataset = _open_dataset(source.path)
    if field not in dataset.column_names:
        raise InputFileError(
            f"{source.path} has no column {field!r}; name that of the text ({_names(dataset.column_names)})"
        )
    rows = dataset.with_format(None).select_columns([field])
    for number, row in enumerate(rows):
        yield Item(number, _checked(row[field], source.name(number)), source.size * (number + 1) // len(rows))


def _open_dataset(folder: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError(f"{folder} is a dataset on disk: pip install datasets to read it") from None
    try:
        dataset = datasets.load_from_disk(str(folder))
        inside = all(Path(file["filename"]).resolve().is_relative_to(folder.resolve()) for file in dataset.cache_files)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputFileError(f"{folder} is not a dataset that can be read: {reason}") from None
    if not inside:
        raise InputFileError(f"{folder} names files outside of itself; write it again with save_to_disk")
    return dataset


READERS: dict[str, Callable[[Source, str], Iterator[Item]]] = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "dataset": _read_dataset,
}
