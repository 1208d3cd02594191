"""Converting a transformers folder (see `TARGETS`) to GGUF, with or without factors, in blocks of rows."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longrope_export.converters.copying import Sender
from longrope_export.converters.gguf.conversion import Conversion, plan_conversion
from longrope_export.converters.gguf.conversion_keys import add_keys, factor_tensors
from longrope_export.converters.gguf.encodings import Rows, encode, encoded_bytes, ggml_type
from longrope_export.converters.gguf.naming import Parts, shape_of
from longrope_export.converters.gguf.targets import heads
from longrope_export.converters.gguf.weights import StoredTensor, permute_pairs, read_rows, row_blocks
from longrope_export.files import atomic_output
from longrope_export.scaling import RopeScaling

# numpy leaves the interpreter's lock while it computes; more threads than these wait for the disk.
_THREADS = 4
_ALIGNMENT = 32
# whether a tensor begins with these rows, and what makes them
Job = tuple[bool, Callable[[], Rows]]


def convert_to_gguf(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    scaling: RopeScaling | None = None,
    *,
    dtype: str = "f16",
    architecture: str | None = None,
    static: bool = False,
    allow_lossy: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Write the model in `folder` as the GGUF `target`: matrices in `dtype` (one of `DTYPES`), vectors
    in F32.

    `scaling` None keeps what config.json says, a static rope type (llama3, yarn, linear) as one set of factors for every
    length; `static` does so with the long factors of a record. `architecture` names one of llama.cpp's that stands for
    the family's own (see `STAND_INS`). Peak memory is a few blocks of
    rows and the tokenizer. Returns what llama.cpp
    will not apply, which is refused unless `allow_lossy`. Raises `UnsupportedModelError` for other families,
    tokenizers or tensors that llama.cpp's architecture lacks, `InputFileError`, `ScalingError`,
    `LossyTargetError`, and `OutputError`.
    """
    plan = plan_conversion(
        folder, scaling, dtype=dtype, architecture=architecture, static=static, allow_lossy=allow_lossy
    )
    write_conversion(plan, target, overwrite=overwrite)
    return plan.losses


def write_conversion(plan: Conversion, target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write the planned GGUF; raises `OutputError`, and `NumericalError` when float16 cannot hold a
    weight.
    """
    with atomic_output(target, overwrite=overwrite) as file:
        factors = factor_tensors(plan)
        _write_header(Path(file.name), plan, factors)
        file.seek(0, os.SEEK_END)
        _write_tensors(file, plan, factors)


def _write_header(path: Path, plan: Conversion, factors: Mapping[str, Any]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, plan.target.architecture)
    try:
        add_keys(writer, plan)
        _add_tensor_infos(writer, plan.tensors, factors, plan.dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_tensor_infos(writer: Any, tensors: Mapping[str, Parts], factors: Mapping[str, Any], dtype: str) -> None:
    from gguf.constants import GGMLQuantizationType

    for name, parts in tensors.items():
        shape = shape_of(parts)
        kind = ggml_type(name, shape, dtype)
        size = encoded_bytes(shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, GGMLQuantizationType[kind])
    for name, values in factors.items():
        writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)


def _write_tensors(file: BinaryIO, plan: Conversion, factors: Mapping[str, Any]) -> None:
    """Blocks are read and encoded by threads, and written in order by this one."""
    sender = Sender(file)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        for begins, block in _in_order(pool, _jobs(plan)):
            if begins:
                sender.pad(_ALIGNMENT)
            sender.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
    for values in factors.values():
        sender.pad(_ALIGNMENT)
        sender.write(values.tobytes())
    sender.pad(_ALIGNMENT)
    sender.finish()


def _jobs(plan: Conversion) -> Iterator[Job]:
    for name, parts in plan.tensors.items():
        kind, permuted = ggml_type(name, shape_of(parts), plan.dtype), _permuted_heads(name, plan)
        for part in parts:
            for rows in row_blocks(part, permuted):
                begins = part is parts[0] and rows[0] == 0
                yield begins, partial(_encoded, name, part, rows, permuted, kind)


def _permuted_heads(name: str, plan: Conversion) -> int | None:
    """Heads of a q or k tensor whose rows change places, else None."""
    query_heads, kv_heads = heads(plan.model)
    number = {"attn_q": query_heads, "attn_k": kv_heads}.get(name.split(".")[-2])
    return number if plan.target.permuted else None


def _encoded(name: str, part: StoredTensor, rows: tuple[int, int], permuted: int | None, kind: str) -> Rows:
    values = read_rows(part, *rows)
    if permuted:
        values = permute_pairs(values, len(values) * permuted // part.info.shape[0])
    return encode(values, part.info.dtype, kind, name)


def _in_order(pool: ThreadPoolExecutor, jobs: Iterator[Job]) -> Iterator[tuple[bool, Rows]]:
    """Results in the order of the jobs, of which no more are begun than the threads and the writer keep busy."""
    waiting: deque[tuple[bool, Future[Rows]]] = deque()
    for begins, job in jobs:
        waiting.append((begins, pool.submit(job)))
        if len(waiting) > _THREADS:
            begins, done = waiting.popleft()
            yield begins, done.result()
    for begins, done in waiting:
        yield begins, done.result()
