"""Encodings of a converted file's tensors: the same values as gguf's and numpy's own, and read by a real llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export.cli.common import GGUF_DTYPE
from longrope_export.converters.gguf import weights
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.encodings import DTYPES, encode, ggml_type, widened
from longrope_export.errors import NumericalError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_tensors import read_tensor
from longrope_export.runtimes import llamacpp

pytestmark = pytest.mark.usefixtures("quiet")
EVERY_BFLOAT16 = np.arange(1 << 16, dtype=np.uint16)


def test_every_bfloat16_becomes_the_float16_that_numpy_makes_of_it() -> None:
    wide = widened(EVERY_BFLOAT16, "BF16")
    fits = ~(np.isfinite(wide) & (np.abs(wide) >= 65520))
    with np.errstate(invalid="ignore"):
        expected = wide[fits].astype(np.float16).view(np.uint16)
    assert np.array_equal(encode(EVERY_BFLOAT16[fits], "BF16", "F16", "t"), expected)
    for bits in EVERY_BFLOAT16[~fits][[0, -1]]:
        with pytest.raises(NumericalError, match="the tensor t has values beyond float16's range"):
            encode(np.array([[0, bits]], np.uint16), "BF16", "F16", "t")


@pytest.mark.parametrize("stored", ["F64", "F32"])
def test_wider_numbers_are_rounded_and_infinity_stays(stored: str) -> None:
    kind = {"F64": np.float64, "F32": np.float32}[stored]
    values = np.array([[1.0001, -np.inf, np.nan, 65504.0, 1e-8]], kind)
    np.testing.assert_array_equal(encode(values, stored, "F16", "t").view(np.float16), values.astype(np.float16))
    with pytest.raises(NumericalError):
        encode(np.array([1.0, 65520.0], kind), stored, "F16", "t")


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in ("f32", "f16")])
@pytest.mark.parametrize("stored", ["F32", "BF16", "F16"])
def test_quantised_rows_are_gguf_s_own(dtype: str, stored: str) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    values = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    values[0, :64] = 0
    values[1] = np.arange(512) % 64 / 2 - 15.5  # halves: the numbers between two
    values[1, ::32] = 127
    values[2] *= 1e-4
    raw = {"F32": values, "F16": values.astype(np.float16), "BF16": (values.view(np.uint32) >> 16).astype(np.uint16)}
    kind = DTYPES[dtype].matrices
    found = encode(raw[stored], stored, kind, "t")
    expected = quantize(widened(raw[stored], stored), GGMLQuantizationType[kind])
    assert np.array_equal(found.view(np.uint8), expected.view(np.uint8))


def test_the_table_is_what_gguf_can_quantise_and_what_the_commands_offer() -> None:
    from gguf.constants import GGML_QUANT_SIZES, LlamaFileType
    from gguf.quants import _type_traits

    able = set()
    for kind, traits in _type_traits.items():
        try:
            traits.quantize_blocks(np.ones((1, GGML_QUANT_SIZES[kind][0]), np.float32))
        except NotImplementedError:
            continue
        able.add(kind.name)
    assert {row.matrices for row in DTYPES.values()} == able | {"F32", "F16"}
    assert list(DTYPES) == list(GGUF_DTYPE.choices)
    names = {name: row.file_type for name, row in DTYPES.items()}
    special = {"f32": LlamaFileType.ALL_F32, "mxfp4": LlamaFileType.MOSTLY_MXFP4_MOE}
    for name, number in names.items():
        assert number == special.get(name, getattr(LlamaFileType, f"MOSTLY_{name.upper()}", None)), name


def test_ends_and_odd_rows_get_finer_types() -> None:
    assert ggml_type("blk.0.attn_q.weight", (4, 64), "q4_0") == "Q4_0"
    assert ggml_type("output.weight", (4, 64), "q4_0") == "Q8_0"
    assert ggml_type("token_embd.weight", (4, 256), "tq2_0") == "F16"
    assert ggml_type("blk.0.attn_q.weight", (4, 64), "tq2_0") == "F16"
    assert ggml_type("blk.0.attn_q.bias", (64,), "q4_0") == "F32"


def prompt() -> list[int]:
    return [(7 * index * index + 3) % 590 + 2 for index in range(200)]


@pytest.mark.parametrize(
    "dtype", ["q4_1", *(pytest.param(name, marks=pytest.mark.slow) for name in ("q4_0", "q5_0", "q5_1", "mxfp4"))]
)
def test_llama_cpp_computes_what_the_stored_values_give(small_llama: Path, tmp_path: Path, dtype: str) -> None:
    """Against an F32 file of the dequantised weights: what differs is llama.cpp's own arithmetic in eight bits."""
    convert_to_gguf(small_llama, tmp_path / "m.gguf", dtype=dtype)
    convert_to_gguf(small_llama, tmp_path / "f32.gguf", dtype="f32")
    header, exact = read_gguf_header(tmp_path / "m.gguf"), read_gguf_header(tmp_path / "f32.gguf")
    assert {info.ggml_type for info in header.tensors if len(info.shape) == 2} > {8}
    raw = bytearray((tmp_path / "f32.gguf").read_bytes())
    for info in exact.tensors:
        start = exact.data_start + info.offset
        raw[start : start + info.size] = np.ascontiguousarray(read_tensor(header, info.name), np.float32).tobytes()
    (tmp_path / "same.gguf").write_bytes(raw)
    ours, same, unquantised = (
        llamacpp.next_token_probabilities(tmp_path / f"{name}.gguf", [prompt()], context=256)[0]
        for name in ("m", "same", "f32")
    )
    assert np.abs(ours - same).max() < 0.5 * np.abs(same - unquantised).max()


def test_ternary_types_need_rows_of_256(small_llama: Path, tmp_path: Path) -> None:
    convert_to_gguf(small_llama, tmp_path / "m.gguf", dtype="tq1_0")
    header = read_gguf_header(tmp_path / "m.gguf")
    assert {info.ggml_type for info in header.tensors if len(info.shape) == 2} == {1}
    assert header.get("general.file_type") == 36


@pytest.mark.parametrize("dtype", ["f32", "q8_0"])
def test_the_size_of_blocks_changes_nothing(
    small_llama: Path, record: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Heads stay whole, and rows in order, also where a block is one row."""
    convert_to_gguf(small_llama, tmp_path / "whole.gguf", record(32), dtype=dtype)
    monkeypatch.setattr(weights, "_BLOCK_VALUES", 1)
    convert_to_gguf(small_llama, tmp_path / "rows.gguf", record(32), dtype=dtype)
    assert (tmp_path / "rows.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
