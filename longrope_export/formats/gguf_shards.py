"""Split GGUF files: the shards of one model, found by name and read as one header.

llama.cpp finds them the same way: PREFIX-00001-of-00003.gguf holds the keys, any shard holds tensors, and each says
its number (`split.no`, from 0) and the sum of all tensors (`split.tensors.count`).
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.formats.gguf_header import GgufHeader, read_gguf_header

COUNT_KEY, NUMBER_KEY, TENSORS_KEY = "split.count", "split.no", "split.tensors.count"
MAX_SHARDS = 4096
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


def read_gguf(path: str | os.PathLike[str]) -> GgufHeader:
    """The header of a GGUF file; of a split one the first shard's, with those of the others in `others`.

    Any shard may be named. Raises `InputFileError` as `read_gguf_header`, and when a shard is missing, stands under
    another name, or says another number or sum.
    """
    header = read_gguf_header(path)
    count = shard_count(header)
    if count == 1:
        return header
    first, *others = [read_gguf_header(shard) for shard in shard_paths(Path(path), count)]
    whole = replace(first, others=tuple(others))
    if problems := split_problems(whole):
        raise InputFileError(f"{problems[0]}; see `longrope doctor {first.path}`")
    return whole


def shard_count(header: GgufHeader) -> int:
    """Number of files that the model stands in; raises `InputFileError` when the key is no sensible number."""
    count = header.get(COUNT_KEY, 1)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_SHARDS:
        raise InputFileError(
            f"{header.path} says that it is one of {str(count)[:40]} shards; at most {MAX_SHARDS} are read"
        )
    return max(count, 1)


def shard_paths(path: Path, count: int) -> list[Path]:
    """All shards' files beside the shard `path`; raises `InputFileError` when its name is not a shard's."""
    match = _NAME.fullmatch(path.name)
    if match is None or int(match[3]) != count or not 1 <= int(match[2]) <= count:
        raise InputFileError(
            f"{path} is one of {count} shards, which are found by their names; "
            f"name it as it was, like NAME-00001-of-{count:05}.gguf"
        )
    return [path.with_name(f"{match[1]}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def extended_name(path: Path, length: str) -> str:
    """Name for the same file with a window of `length`: before a shard's numbers, else before the suffix."""
    match = _NAME.fullmatch(path.name)
    return f"{match[1]}-{length}-{match[2]}-of-{match[3]}.gguf" if match else f"{path.stem}-{length}.gguf"


def refuse_split(path: str | os.PathLike[str]) -> None:
    """Raise `UnsupportedModelError` when the GGUF file is one of several shards, which transformers cannot open."""
    count = shard_count(read_gguf_header(path))
    if count > 1:
        raise UnsupportedModelError(
            f"{path} is one of {count} shards, which transformers cannot open; "
            "join them first: llama-gguf-split --merge FIRST-SHARD OUT.gguf"
        )


def split_problems(header: GgufHeader) -> list[str]:
    """What llama.cpp would refuse in the split keys of a header with its `others`."""
    shards = (header, *header.others)
    wrong = [
        f"{shard.path} says that it is shard {shard.get(NUMBER_KEY)} of {shard.get(COUNT_KEY)}, not {number} of {len(shards)}"
        for number, shard in enumerate(shards)
        if (shard.get(NUMBER_KEY), shard.get(COUNT_KEY)) != (number, len(shards))
    ]
    names = [info.name for info in header.all_tensors]
    if len(set(names)) < len(names):
        wrong.append(f"{header.path} and its other shards hold a tensor twice")
    total = len(names)
    if header.get(TENSORS_KEY) != total:
        wrong.append(f"{header.path} says that the shards hold {header.get(TENSORS_KEY)} tensors, they hold {total}")
    return wrong
