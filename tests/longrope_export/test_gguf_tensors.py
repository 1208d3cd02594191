"""Tensors read from GGUF files, against gguf-py's reader and dequantisers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.formats import gguf_tensors
from longrope_export.formats.ggml_types import block_layout, type_name
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_tensors import read_raw, read_tensor

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> GGUFReader:
    return GGUFReader(smollm2)


def write_gguf(path: Path, tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]]) -> Path:
    writer = GGUFWriter(path, "llama")
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_smollm2_header_agrees_with_the_reference_reader(smollm2: Path, reference: GGUFReader) -> None:
    header = read_gguf_header(smollm2)
    assert header.data_start == reference.data_offset
    expected = [(t.name, tuple(map(int, t.shape)), int(t.tensor_type), t.n_bytes) for t in reference.tensors]
    assert [(t.name, t.shape, t.ggml_type, t.size) for t in header.tensors] == expected
    assert [header.data_start + t.offset for t in header.tensors] == [t.data_offset for t in reference.tensors]
    assert list(header.metadata) == [key for key in reference.fields if not key.startswith("GGUF.")]
    for key, item in header.metadata.items():
        field = reference.fields[key]
        if not item.is_array:
            assert header.get(key) == field.contents(), key
            continue
        ours = header.read_array(key)
        assert len(ours) == len(field.data)
        for index in sorted({0, len(ours) // 2, len(ours) - 1}):
            assert ours[index] == field.contents(index), (key, index)


@pytest.mark.parametrize("name", ["blk.0.attn_q.weight", "blk.3.ffn_down.weight", "output_norm.weight"])
def test_smollm2_tensors_agree_with_the_reference(name: str, smollm2: Path, reference: GGUFReader) -> None:
    header = read_gguf_header(smollm2)
    expected = next(tensor for tensor in reference.tensors if tensor.name == name)
    values = read_tensor(header, name)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, dequantize(expected.data, expected.tensor_type))
    assert read_raw(header, name) == expected.data.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_each_type_is_read_in_chunks_of_rows(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_tensors, "_CHUNK_BYTES", 300)
    values = np.random.default_rng(0).normal(size=(2, 7, 64)).astype(np.float32)
    ggml_type = GGMLQuantizationType[kind]
    stored = quantize(values, ggml_type)
    first = np.zeros(3, np.float32)
    path = write_gguf(tmp_path / "m.gguf", {"a": (first, GGMLQuantizationType.F32), "t": (stored, ggml_type)})
    result = read_tensor(read_gguf_header(path), "t")
    assert result.shape == (2, 7, 64)
    np.testing.assert_array_equal(result, dequantize(stored, ggml_type).reshape(2, 7, 64))
    np.testing.assert_allclose(result, values, atol=0.5)


def test_k_quants_are_read(tmp_path: Path) -> None:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType.Q6_K]
    raw = np.random.default_rng(0).integers(0, 120, (3, 2 * size), dtype=np.uint8)
    path = write_gguf(tmp_path / "m.gguf", {"t": (raw, GGMLQuantizationType.Q6_K)})
    result = read_tensor(read_gguf_header(path), "t")
    assert result.shape == (3, 2 * block)
    np.testing.assert_array_equal(result, dequantize(raw, GGMLQuantizationType.Q6_K))


def test_block_layouts_are_those_of_the_gguf_package() -> None:
    assert block_layout(GGMLQuantizationType.Q4_K) == (256, 144)
    assert (type_name(GGMLQuantizationType.Q4_K), type_name(9999)) == ("Q4_K", "type 9999")
    assert block_layout(9999) is None


def test_an_empty_tensor_has_its_shape(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"t": (np.zeros((0, 4), np.float32), GGMLQuantizationType.F32)})
    assert read_tensor(read_gguf_header(path), "t").shape == (0, 4)


def test_failures_are_named(tmp_path: Path) -> None:
    integers = np.arange(4, dtype=np.int32)
    path = write_gguf(tmp_path / "m.gguf", {"t": (integers, GGMLQuantizationType.I32)})
    header = read_gguf_header(path)
    with pytest.raises(InputFileError, match="no tensor 'absent'"):
        read_tensor(header, "absent")
    with pytest.raises(UnsupportedModelError, match="'t' has type I32"):
        read_tensor(header, "t")
    path.write_bytes(path.read_bytes()[: header.data_start + 3])
    with pytest.raises(InputFileError, match=r"truncated: .* are needed, .* are there"):
        read_raw(header, "t")
