"""Writes the seed corpus of the fuzzer: small files that reach every branch of the two readers.

    python tests/fuzz/corpus.py

The files are kept in the repository, so that a fuzzer can be started on them as they are.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
F32, Q8_0 = 0, 8


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(key: str, kind: int, count: int, elements: bytes) -> bytes:
    return entry(key, 9, struct.pack("<IQ", kind, count) + elements)


def row(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def gguf(entries: list[bytes], rows: list[bytes], data: bytes = b"", *, version: int = 3, alignment: int = 32) -> bytes:
    raw = b"GGUF" + struct.pack("<IQQ", version, len(rows), len(entries)) + b"".join(entries) + b"".join(rows)
    return raw + bytes(-len(raw) % alignment if rows else 0) + data


def factors(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values).ljust(32, b"\0")


def safetensors(header: object, data: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data)


def packed(before: str) -> str:
    """A former header, not compressed, so that every zlib makes the same bytes of it."""
    return base64.b64encode(zlib.compress(before.encode(), 0)).decode()


def gguf_seeds() -> dict[str, bytes]:
    """Every value type, every array type, empty arrays, alignments, a whole LongRoPE model and a static one."""
    sizes = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    scalars = [entry(f"k{kind}", kind, struct.pack(f"<{code}", 1)) for kind, code in sizes.items()]
    arrays = [array(f"a{kind}", kind, 2, struct.pack(f"<2{code}", 0, 1)) for kind, code in sizes.items()]
    strings = [entry("s", 8, text("grüß")), array("t", 8, 3, text("a") + text("") + text(b"\xff"))]
    empty = [array("e8", 8, 0, b""), array("e4", 4, 0, b""), entry("empty", 8, text(""))]
    model = [
        entry("general.architecture", 8, text("llama")),
        entry("llama.context_length", 4, struct.pack("<I", 2048)),
        entry("llama.rope.dimension_count", 4, struct.pack("<I", 8)),
        entry("llama.rope.freq_base", 6, struct.pack("<f", 10000.0)),
    ]
    longrope = [
        *model,
        entry("llama.rope.scaling.type", 8, text("longrope")),
        entry("llama.rope.scaling.original_context_length", 4, struct.pack("<I", 512)),
        entry("llama.rope.scaling.attn_factor", 6, struct.pack("<f", 1.1)),
    ]
    pair = [row("rope_factors_long.weight", (4,), F32, 0), row("rope_factors_short.weight", (4,), F32, 32)]
    record = {
        "format": "longrope-export/1", "rope_theta": 10000.0, "rotary_dim": 8,
        "original_max_position_embeddings": 512, "max_position_embeddings": 2048,
        "long_factor": [1, 2, 3, 4], "short_factor": [1, 1, 1, 1],
        "long_attention_factor": struct.unpack("<f", struct.pack("<f", 1.1))[0],
        "short_attention_factor": struct.unpack("<f", struct.pack("<f", 1.1))[0],
    }  # fmt: skip
    undo = {"format": 1, "header": 64, "sha256": "0" * 64, "size": 96, "pieces": ["4747", [24, 8], [-8, 8]],
            "spots": [[0, "00"]]}  # fmt: skip
    payload = json.dumps(undo).encode() + bytes(50)
    tables = [
        row("a", (3, 2), F32, 0),
        row("b", (32, 1, 1, 1), Q8_0, 32),
        row("c", (), F32, 96),
        row("d", (0,), F32, 128),
    ]
    aligned = [entry("general.alignment", 4, struct.pack("<I", 64))]
    return {
        "smallest": gguf([], []),
        "scalars": gguf(scalars, []),
        "arrays": gguf([*arrays, *strings, *empty], []),
        "tensors": gguf([], tables, bytes(128)),
        "version2": gguf(aligned, [row("a", (1,), F32, 0)], bytes(64), version=2, alignment=64),
        "longrope": gguf(longrope, pair, factors(1, 2, 3, 4) + factors(1, 1, 1, 1)),
        "record": gguf(
            [*longrope, entry("longrope_export.scaling", 8, text(json.dumps(record)))],
            pair,
            factors(1, 2, 3, 4) + factors(1, 1, 1, 1),
        ),
        "static": gguf(model, [row("rope_freqs.weight", (4,), F32, 0)], factors(1, 2, 4, 8)),
        "undo": gguf([*longrope, array("longrope_export.undo", 0, len(payload), payload)], pair, bytes(64)),
        "nested": gguf([array("n", 9, 1, struct.pack("<IQ", 4, 0))], []),
    }


def safetensors_seeds() -> dict[str, bytes]:
    """Metadata, several dtypes, no tensors, padding behind the JSON, deep and odd JSON."""
    tensor = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
    half = {"dtype": "BF16", "shape": [], "data_offsets": [8, 10]}
    nothing = {"dtype": "I64", "shape": [0, 4], "data_offsets": [10, 10]}
    return {
        "smallest": safetensors({}),
        "two": safetensors({"__metadata__": {"format": "pt"}, "a": tensor, "b": half, "c": nothing}, 10),
        "padded": safetensors(json.dumps({"a": tensor}).encode() + b"   ", 8),
        "record": safetensors({"__metadata__": {"longrope_export.scaling": '{"format": "longrope-export/1"}'}}),
        "undo": safetensors(
            {"__metadata__": {"longrope_export.undo": packed(json.dumps({"a": tensor}))}, "a": tensor}, 8
        ),
        "deep": safetensors(b'{"a":' + b"[" * 60 + b"]" * 60 + b"}"),
        "numbers": safetensors(b'{"a":{"dtype":"U8","shape":[1e1,-1,1.5,true,null],"data_offsets":[0,10]}}', 10),
        "escapes": safetensors(b'{"\\u0061\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
        "subbyte": safetensors({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1),
    }


def main() -> None:
    for kind, seeds in (("gguf", gguf_seeds()), ("safetensors", safetensors_seeds())):
        (CORPUS / kind).mkdir(parents=True, exist_ok=True)
        for name, raw in seeds.items():
            (CORPUS / kind / f"{name}.{kind}").write_bytes(raw)


if __name__ == "__main__":
    main()
