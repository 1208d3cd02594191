"""Opening a hostile file takes no more memory than twice its size and 16 MiB: the system's own limit enforces it."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import resource, sys
from longrope_export.errors import InputFileError
from longrope_export.formats import gguf_header, safetensors_header
path, size, free = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "free"
if free:
    gguf_header._LEAST_TENSORS = gguf_header.MAX_ENTRIES = gguf_header._LEAST_TEXT_BYTES = 1 << 30
    safetensors_header._LEAST_HEADER_BYTES = 1 << 30
status = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
limit = int(status["VmSize"].split()[0]) * 1024 + 2 * size + (16 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
read = gguf_header.read_gguf_header if path.endswith("gguf") else safetensors_header.read_safetensors_header
try:
    read(path)
except InputFileError as error:
    print("refused:", str(error)[-60:])
except MemoryError:
    print("out of memory")
else:
    print("read")
"""


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def gguf(entries: list[bytes], rows: list[bytes], data: int = 0) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(rows), len(entries)) + b"".join(entries) + b"".join(rows)
    return head + bytes(-len(head) % 32 + data)


def small_keys(count: int) -> bytes:
    return gguf([text(b"%x" % index) + struct.pack("<IQ", 10, 1 << 40) for index in range(count)], [])


def small_tensors(count: int) -> bytes:
    rows = [text(b"%x" % index) + struct.pack("<IQQQQIQ", 4, 0, 1, 1, 1, 24, 0) for index in range(count)]
    return gguf([], rows)


def wide_text(count: int, size: int) -> bytes:
    """One character that makes Python store four bytes for each other one."""
    value = struct.pack("<I", 8) + text("😀".encode() + b"x" * size)
    return gguf([text(b"%x" % index) + value for index in range(count)], [])


def safetensors(header: str, data: int = 0) -> bytes:
    return text(header.encode()) + bytes(data)


def nested(size: int) -> str:
    """Lists of one list each: two bytes of text, a hundred of memory."""
    block = "[" * 400 + "]" * 400
    return '{"a":[' + ",".join([block] * (size // 801)) + "]}"


def rows(count: int) -> str:
    entry = {"dtype": "U8", "shape": [], "data_offsets": [0, 0]}
    return json.dumps({f"{index:x}": {**entry, "data_offsets": [index, index + 1]} for index in range(count)})


# name → (bytes, whether the reader accepts them, whether they would take too much without our limits)
FILES: dict[str, tuple[str, bytes, bool, bool]] = {
    "many keys": ("gguf", small_keys(8192), True, False),
    "too many keys": ("gguf", small_keys(130_000), False, True),
    "many tensors": ("gguf", small_tensors(8192), True, False),
    "too many tensors": ("gguf", small_tensors(120_000), False, True),
    "wide text": ("gguf", wide_text(4, 260_000), True, False),
    "too much wide text": ("gguf", wide_text(100, 260_000), False, True),
    "one long text": ("gguf", wide_text(1, 30_000_000), False, True),
    "lists": ("safetensors", safetensors(nested(250_000)), False, False),
    "more lists": ("safetensors", safetensors(nested(2_500_000)), False, True),
    "empty objects": ("safetensors", safetensors('{"a":[' + "{}," * 1_000_000 + "{}]}"), False, True),
    "many rows": ("safetensors", safetensors(rows(3500), 3500), True, False),
    "wide names": ("safetensors", safetensors('{"__metadata__":{"😀":"' + "x" * 250_000 + '"}}'), True, False),
}


def outcome(path: Path, mode: str) -> str:
    command = [sys.executable, "-c", CHILD, str(path), str(path.stat().st_size), mode]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", FILES)
def test_memory_stays_within_the_bound(tmp_path: Path, name: str) -> None:
    suffix, raw, accepted, dangerous = FILES[name]
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(raw)
    found = outcome(path, "limited")
    assert found == "read" if accepted else found.startswith("refused:"), found
    if dangerous:
        assert outcome(path, "free") == "out of memory", "the limit must bite where ours are lifted"
