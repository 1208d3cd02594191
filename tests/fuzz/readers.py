"""Fuzzes the GGUF and the safetensors reader, and what is built on them, with hypothesis.

    python tests/fuzz/readers.py [--minutes 10] [--seed 0] [--kind gguf|safetensors]

Files of the seed corpus are damaged at random, or built from random parts. Nothing but our own errors may come out, in
little time and memory, and what is accepted must lie within the file. A failing file is made as small as hypothesis can
and written beside the corpus as `crash-….bin`; the exit code is 1.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from longrope_export.converters.gguf.checks import existing_factors
from longrope_export.converters.gguf.in_place_undo import read_original
from longrope_export.converters.safetensors_undo import original_header
from longrope_export.errors import LongRopeError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_scaling import scaling_from_gguf
from longrope_export.formats.records import scaling_from_metadata
from longrope_export.formats.safetensors_header import read_safetensors_header

CORPUS = Path(__file__).parent / "corpus"
SLOWEST_SECONDS = 5.0
# The edges of every size that a header can hold.
NUMBERS = sorted({max(0, (1 << bits) + step) for bits in (0, 5, 8, 16, 31, 32, 40, 62, 63) for step in (-1, 0, 1)})
Mutation = Callable[[bytearray, st.DataObject], None]


def check_gguf(path: Path) -> None:
    """Read everything that our commands read of a GGUF file before they act on it."""
    header = read_gguf_header(path)
    spans = [(entry.start, entry.end) for entry in header.metadata.values()]
    spans += [(info.start, info.end) for info in header.tensors]
    assert all(left[1] == right[0] for left, right in itertools.pairwise(spans)), "the header has a gap"
    for info in header.tensors:
        assert 0 <= header.data_start + info.offset <= header.data_start + info.offset + info.size <= header.file_size
    for key, entry in header.metadata.items():
        if entry.is_array:
            assert len(header.read_array(key)) == entry.array_length
    for read in (scaling_from_gguf, read_original, existing_factors):
        only_our_errors(lambda read=read: read(header))


def check_safetensors(path: Path) -> None:
    """Read a safetensors header and the record in it."""
    header = read_safetensors_header(path)
    ends = sorted((tensor.start, tensor.end) for tensor in header.tensors.values())
    assert not ends or (ends[0][0], ends[-1][1]) == (0, header.file_size - header.data_start)
    only_our_errors(lambda: scaling_from_metadata(header.metadata))
    only_our_errors(lambda: original_header(header))


CHECKS: dict[str, Callable[[Path], None]] = {"gguf": check_gguf, "safetensors": check_safetensors}


def only_our_errors(action: Callable[[], object]) -> None:
    """Anything that is not a `LongRopeError` is a finding."""
    message = ""
    try:
        action()
    except LongRopeError as error:
        message = str(error)
    assert "\n" not in message, "an error is one line"
    assert len(message) < 2000, "an error is short"


def run_one(kind: str, path: Path, raw: bytes) -> None:
    """Write `raw` to `path` and read it; raises on a finding."""
    path.write_bytes(raw)
    started = time.process_time()
    only_our_errors(lambda: CHECKS[kind](path))
    assert time.process_time() - started < SLOWEST_SECONDS, "a small file takes long"


@functools.cache
def seeds(kind: str) -> list[bytes]:
    """The corpus, by name."""
    found = [path.read_bytes() for path in sorted((CORPUS / kind).iterdir())]
    assert found, "the corpus is missing: python tests/fuzz/corpus.py"
    return found


def position(raw: bytearray, data: st.DataObject) -> int:
    return data.draw(st.integers(0, max(0, len(raw) - 1)))


def set_byte(raw: bytearray, data: st.DataObject) -> None:
    if raw:
        raw[position(raw, data)] = data.draw(st.integers(0, 255))


def set_number(raw: bytearray, data: st.DataObject) -> None:
    code, mask = data.draw(st.sampled_from([("<Q", (1 << 64) - 1), ("<I", (1 << 32) - 1)]))
    value = struct.pack(code, data.draw(st.sampled_from(NUMBERS)) & mask)
    start = position(raw, data)
    raw[start : start + len(value)] = value


def insert(raw: bytearray, data: st.DataObject) -> None:
    start = position(raw, data)
    raw[start:start] = data.draw(st.binary(max_size=40))


def remove(raw: bytearray, data: st.DataObject) -> None:
    start = position(raw, data)
    del raw[start : start + data.draw(st.integers(1, 64))]


def repeat(raw: bytearray, data: st.DataObject) -> None:
    start = position(raw, data)
    block = raw[start : start + data.draw(st.integers(1, 64))]
    raw[start:start] = block * data.draw(st.integers(1, 8))


def cut(raw: bytearray, data: st.DataObject) -> None:
    del raw[position(raw, data) :]


MUTATIONS: list[Mutation] = [set_byte, set_number, insert, remove, repeat, cut]


def damaged(kind: str, data: st.DataObject) -> bytes:
    """A file of the corpus after up to six random changes; a safetensors header keeps its right length half the time."""
    raw = bytearray(data.draw(st.sampled_from(seeds(kind))))
    for _ in range(data.draw(st.integers(1, 6))):
        data.draw(st.sampled_from(MUTATIONS))(raw, data)
    if kind == "safetensors" and data.draw(st.booleans()):
        end = raw.rfind(b"}") + 1
        raw[:8] = struct.pack("<Q", max(0, end - 8))
    return bytes(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NUMBERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)


def built_safetensors(data: st.DataObject) -> bytes:
    """Random JSON, or tensors with random parts, behind its right length."""
    part = st.sampled_from(NUMBERS[:12]) | st.integers(-2, 40)
    tensor = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", "BOOL", "X"]),
            "shape": st.lists(part, max_size=3),
            "data_offsets": st.lists(part, max_size=3),
        }
    )
    names = st.sampled_from(["a", "b", "__metadata__", ""])
    header = data.draw(st.dictionaries(names, tensor | JSON, max_size=4))
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data.draw(st.integers(0, 80)))


def built_gguf(data: st.DataObject) -> bytes:
    """Random keys, values and rows, mostly well framed."""
    number = st.sampled_from(NUMBERS) | st.integers(0, 40)
    raw = bytearray(b"GGUF" + struct.pack("<I", data.draw(st.sampled_from([2, 3, 3, 3]))))
    keys, rows = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    raw += struct.pack("<QQ", rows, keys)
    for _ in range(keys):
        name = data.draw(
            st.sampled_from([b"general.alignment", b"general.architecture", b"k", b"longrope_export.undo"])
        )
        kind = data.draw(st.integers(0, 13))
        raw += struct.pack("<Q", len(name)) + name + struct.pack("<I", kind)
        if kind == 9:
            raw += struct.pack("<IQ", data.draw(st.integers(0, 13)), data.draw(number))
        raw += struct.pack("<Q", data.draw(number)) + data.draw(st.binary(max_size=24))
    for index in range(rows):
        name = data.draw(st.sampled_from([b"rope_freqs.weight", b"rope_factors_long.weight", b"t%d" % index]))
        shape = data.draw(st.lists(number, max_size=5))
        raw += struct.pack("<Q", len(name)) + name + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        raw += struct.pack("<IQ", data.draw(st.integers(0, 40)), data.draw(number))
    return bytes(raw) + bytes(data.draw(st.integers(0, 200)))


BUILT: dict[str, Callable[[st.DataObject], bytes]] = {"gguf": built_gguf, "safetensors": built_safetensors}


def fuzz(kind: str, number: int, examples: int, folder: Path) -> bytes | None:
    """Run `examples` random files; the smallest failing one, or None."""
    path = folder / f"fuzz.{kind}"
    failing: list[bytes] = []

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def property_holds(data: st.DataObject) -> None:
        raw = BUILT[kind](data) if data.draw(st.integers(0, 3)) == 0 else damaged(kind, data)
        try:
            run_one(kind, path, raw)
        except BaseException:
            failing.append(raw)
            raise

    try:
        property_holds()
    except BaseException as error:
        if not failing:
            raise
        print(f"{kind}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        return failing[-1]
    return None


def main(arguments: list[str] | None = None) -> int:
    """Fuzz until the time is over or something is found; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=2000, help="per round of one reader")
    parser.add_argument("--kind", choices=sorted(CHECKS), action="append")
    options = parser.parse_args(arguments)
    warnings.simplefilter("error")
    end, count = time.monotonic() + 60 * options.minutes, 0
    with tempfile.TemporaryDirectory() as folder:
        for number in itertools.count(options.seed):
            for kind in options.kind or sorted(CHECKS):
                raw = fuzz(kind, number, options.examples, Path(folder))
                count += options.examples
                if raw is not None:
                    name = CORPUS.parent / f"crash-{hashlib.sha256(raw).hexdigest()[:12]}.{kind}"
                    name.write_bytes(raw)
                    print(f"found after {count:,} files: {name}")
                    return 1
            if time.monotonic() >= end:
                break
    print(f"{count:,} files, nothing but our own errors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
