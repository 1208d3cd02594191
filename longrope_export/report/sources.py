"""What there is to report on in a folder: every file of the project's own formats, and why others were left out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError, LongRopeError
from longrope_export.files import MANIFEST
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.records import RECORD_FILE, read_scaling
from longrope_export.report import evaluations, searches
from longrope_export.report.evaluations import read_evaluation
from longrope_export.report.fields import Fields
from longrope_export.report.json_lines import json_lines
from longrope_export.report.results import Evaluation
from longrope_export.report.searches import SearchRun, read_search
from longrope_export.report.training_log import TrainingLog, read_training_log
from longrope_export.scaling import FORMAT as RECORD_FORMAT
from longrope_export.scaling import RopeScaling

# A folder of results is small and flat; anything else was named by mistake.
MOST_ENTRIES, MOST_DEPTH, MOST_OF_A_KIND = 20_000, 3, 12
RESULT_FILE, JOURNAL_FILE, TRAINING_LOG = "result.json", "journal.jsonl", "log.jsonl"
# JSON of every model folder, and of ours that hold no results: not opened.
_NO_RESULTS = frozenset(
    {
        "added_tokens.json", "config.json", "generation_config.json", "model.safetensors.index.json",
        "preprocessor_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    }
)  # fmt: skip


@dataclass(frozen=True)
class ManifestEntry:
    """One file of a finished folder: its size and hash in the manifest, and whether a file of that size is there."""

    name: str
    size: int
    sha256: str
    there: bool


@dataclass
class Sources:
    """Everything that was found below `folder`, by the files' relative names, and one line for each file left out."""

    folder: Path
    records: list[tuple[str, RopeScaling]] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    searches: list[SearchRun] = field(default_factory=list)
    training: list[TrainingLog] = field(default_factory=list)
    manifest: list[ManifestEntry] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.records or self.evaluations or self.searches or self.training)


def find_sources(folder: Path, skip: Path | None = None) -> Sources:
    """Read what `folder` holds (three levels deep, hidden folders and `skip` left out), in the order of the names.

    A file that is broken gets a line in `left_out`. Raises `InputFileError` when there is no such folder, or nothing in
    it to report on.
    """
    if not folder.is_dir():
        raise InputFileError(f"{folder} is not a folder; name one that holds results")
    sources = Sources(folder)
    for path in _files(folder, skip):
        _attempt(sources, path, lambda path=path: _take(sources, path))  # type: ignore[misc]
    if not sources.records:
        _model_record(sources)
    _bound(sources)
    if sources.is_empty:
        reasons = f" ({'; '.join(sources.left_out[:3])})" if sources.left_out else ""
        raise InputFileError(
            f"{folder} holds no factors, no evaluation and no search{reasons}; make one with `longrope eval --out` or "
            "`longrope search --out`"
        )
    return sources


def _files(folder: Path, skip: Path | None) -> Iterator[Path]:
    """JSON files below `folder`; links are not followed."""
    entries = 0
    for root, folders, names in os.walk(folder):
        here = Path(root)
        deep = len(here.relative_to(folder).parts)
        folders[:] = sorted(
            name for name in folders if deep < MOST_DEPTH and not name.startswith(".") and here / name != skip
        )
        entries += len(names)
        if entries > MOST_ENTRIES:
            raise InputFileError(f"{folder} holds over {MOST_ENTRIES:,} files; name the folder of one run")
        for name in sorted(names):
            wanted = name.endswith((".json", ".jsonl")) and name not in _NO_RESULTS and not name.startswith(".")
            if wanted and not (here / name).is_symlink() and (here / name).is_file():
                yield here / name


def source_name(path: Path, folder: Path) -> str:
    """What a file is called on the page: by its folder where it has one of our own names, else by its own."""
    relative = path.relative_to(folder)
    if path.name not in (RECORD_FILE, RESULT_FILE, JOURNAL_FILE, TRAINING_LOG):
        return relative.as_posix().removesuffix(path.suffix)
    return folder.resolve().name if relative.parent == Path() else relative.parent.as_posix()


def _attempt(sources: Sources, path: Path, read: Callable[[], None]) -> None:
    try:
        read()
    except LongRopeError as error:
        name = path.relative_to(sources.folder).as_posix()
        reason = str(error).removeprefix(str(path)).removeprefix(": ").strip()
        sources.left_out.append(f"{name}: {reason}")


def _take(sources: Sources, path: Path) -> None:
    name = source_name(path, sources.folder)
    if path.name.endswith(".jsonl"):
        _take_lines(sources, path, name)
        return
    values = read_json(path)
    if path.name == MANIFEST:
        sources.manifest += _manifest(Fields(values), path.parent, sources.folder)
    elif values.get("format") == RECORD_FORMAT:
        _add_record(sources, name, RopeScaling.from_dict(values))
    elif str(values.get("format")).startswith(evaluations.FORMAT.partition("/")[0]):
        sources.evaluations.append(read_evaluation(values, name))
    elif path.name == RECORD_FILE:
        raise InputFileError("it is no scaling record of this version")


def _take_lines(sources: Sources, path: Path, name: str) -> None:
    first = next(json_lines(path), None)
    kind = first.values.get("format") if first else None
    if kind == searches.FORMAT:
        beside = path.with_name(RECORD_FILE)
        sources.searches.append(read_search(path, name, _record_beside(beside)))
    elif isinstance(kind, str) and kind.startswith("longrope-eval") and not path.with_name(RESULT_FILE).exists():
        raise InputFileError("an evaluation was begun here and has no result yet; run the same command again")
    elif path.name == TRAINING_LOG:
        sources.training.append(read_training_log(path, name))


def _record_beside(path: Path) -> RopeScaling | None:
    # A broken record is named by its own line.
    try:
        return RopeScaling.from_dict(read_json(path)) if path.is_file() else None
    except LongRopeError:
        return None


def _add_record(sources: Sources, name: str, record: RopeScaling) -> None:
    if all(record.to_dict() != known.to_dict() for _, known in sources.records):
        sources.records.append((name, record))


def _model_record(sources: Sources) -> None:
    """The factors that a GGUF, a config.json or safetensors in the folder itself carry."""
    folder = sources.folder
    names = ("config.json", "*.gguf", "*.safetensors")
    files = [path for pattern in names for path in sorted(folder.glob(pattern))[:MOST_OF_A_KIND]]
    for path in files:

        def read(path: Path = path) -> None:
            _add_record(sources, path.name, read_scaling(path))

        try:
            read()
        except LongRopeError:
            continue


def _manifest(values: Fields, folder: Path, root: Path) -> Iterator[ManifestEntry]:
    files = values.object("files") or Fields({})
    for file in list(files.values)[:500]:
        entry = files.object(file) or Fields({})
        size = entry.integer("size") or 0
        yield ManifestEntry(
            (folder.relative_to(root) / file).as_posix(), size, entry.text("sha256") or "", _size(folder, file) == size
        )


def _size(folder: Path, name: str) -> int | None:
    # A stranger's manifest may name any path: only what lies below the folder is looked at.
    try:
        path = (folder / name).resolve()
        return path.stat().st_size if path.is_relative_to(folder.resolve()) else None
    except (OSError, ValueError):
        return None


def _bound(sources: Sources) -> None:
    kinds: list[tuple[str, list[Any]]] = [
        ("records", sources.records), ("evaluations", sources.evaluations), ("searches", sources.searches),
        ("training logs", sources.training),
    ]  # fmt: skip
    for name, found in kinds:
        if len(found) > MOST_OF_A_KIND:
            sources.left_out.append(
                f"{len(found) - MOST_OF_A_KIND} more {name}: only the first {MOST_OF_A_KIND} are shown"
            )
            del found[MOST_OF_A_KIND:]
