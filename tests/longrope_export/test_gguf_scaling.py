"""The record read from GGUF files that gguf-py wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter

from longrope_export.errors import InputFileError, ScalingError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_scaling import (
    LONG_TENSOR,
    RECORD_KEY,
    SHORT_TENSOR,
    STATIC_TENSOR,
    scaling_from_gguf,
)
from longrope_export.scaling import RopeScaling

LONG = np.array([1, 1.1, 1.7, 2.3, 3.1, 3.9, 4.2, 4.5], np.float32)
SHORT = np.array([1, 1, 1, 1.01, 1.02, 1.03, 1.1, 1.2], np.float32)
KEYS: dict[str, Any] = {
    "context_length": 128,
    "rope.dimension_count": 16,
    "rope.freq_base": 50000.0,
    "rope.scaling.type": "longrope",
    "rope.scaling.original_context_length": 32,
    "rope.scaling.attn_factor": 1.1,
}
_KINDS = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}


def write(
    path: Path,
    tensors: dict[str, np.ndarray],
    keys: dict[str, Any],
    record: RopeScaling | str | None = None,
    architecture: str = "llama",
) -> Path:
    writer = GGUFWriter(path, architecture)
    for name, value in keys.items():
        writer.add_key_value(f"{architecture}.{name}", value, _KINDS[type(value)])
    if record is not None:
        writer.add_string(RECORD_KEY, record if isinstance(record, str) else record.to_json())
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), np.float32))
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


BOTH = {LONG_TENSOR: LONG, SHORT_TENSOR: SHORT}


def record(**changes: Any) -> RopeScaling:
    values: dict[str, Any] = {
        "rope_theta": 50000.0,
        "rotary_dim": 16,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 128,
        "long_factor": tuple(LONG.tolist()),
        "short_factor": tuple(SHORT.tolist()),
        "long_attention_factor": 1.1,
        "short_attention_factor": 1.1,
    }
    return RopeScaling(**{**values, **changes})


def read(path: Path) -> RopeScaling | None:
    return scaling_from_gguf(read_gguf_header(path))


def plain(scaling: RopeScaling | None) -> RopeScaling:
    assert scaling is not None
    return replace(scaling, provenance={})


def test_a_file_without_factors_carries_no_record(file: Path) -> None:
    assert read(write(file, {}, KEYS)) is None
    static = {STATIC_TENSOR: LONG}
    assert read(write(file, static, {"context_length": 128})) is None


def test_the_record_is_rebuilt_from_tensors_and_keys(file: Path) -> None:
    found = read(write(file, BOTH, KEYS))
    assert plain(found) == record()
    assert found is not None
    assert found.provenance["source"] == "GGUF factor tensors"


def test_absent_keys_mean_what_llama_cpp_makes_of_them(file: Path) -> None:
    found = plain(read(write(file, BOTH, {"context_length": 128, "rope.scaling.type": "longrope"})))
    assert (found.rope_theta, found.long_attention_factor, found.short_attention_factor) == (
        10000.0,
        1.0,
        1.0,
    )
    assert found.original_max_position_embeddings == 128


def test_an_absent_set_is_all_ones(file: Path) -> None:
    assert plain(read(write(file, {LONG_TENSOR: LONG}, KEYS))) == record(short_factor=())
    assert plain(read(write(file, {SHORT_TENSOR: SHORT}, KEYS))) == record(long_factor=(1.0,) * 8)


def test_our_own_record_comes_back_whole(file: Path) -> None:
    whole = record(short_attention_factor=1.05, long_start_tokens=3, provenance={"method": "test"})
    assert read(write(file, BOTH, KEYS, whole)) == whole


def test_a_static_record_in_rope_freqs_comes_back_whole(file: Path) -> None:
    static = record(short_factor=tuple(LONG.tolist()), provenance={"method": "yarn"})
    keys = {key: value for key, value in KEYS.items() if "scaling.type" not in key and "original" not in key}
    assert read(write(file, {STATIC_TENSOR: LONG}, keys, static)) == static
    with pytest.raises(InputFileError, match="disagree in short_factor"):
        read(write(file, {STATIC_TENSOR: LONG}, keys, record()))


one_ulp = LONG.copy()
one_ulp[3] = np.nextafter(one_ulp[3], np.float32(9))
SHORTER = {LONG_TENSOR: LONG[:-1], SHORT_TENSOR: SHORT[:-1]}
WITHOUT_COUNT = {key: value for key, value in KEYS.items() if key != "rope.dimension_count"}


@pytest.mark.parametrize(
    ("tensors", "keys", "field"),
    [
        ({**BOTH, LONG_TENSOR: one_ulp}, KEYS, "long_factor"),
        ({**BOTH, SHORT_TENSOR: LONG}, KEYS, "short_factor"),
        ({LONG_TENSOR: SHORT, SHORT_TENSOR: LONG}, KEYS, "long_factor, short_factor"),
        (BOTH, {**KEYS, "rope.freq_base": 10000.0}, "rope_theta"),
        (BOTH, {**KEYS, "rope.scaling.attn_factor": 1.21}, "long_attention_factor"),
        (BOTH, {**KEYS, "context_length": 256}, "max_position_embeddings"),
        (
            BOTH,
            {**KEYS, "rope.scaling.original_context_length": 64},
            "original_max_position_embeddings",
        ),
        (SHORTER, WITHOUT_COUNT, "rotary_dim, long_factor, short_factor"),
    ],
)
def test_a_record_that_disagrees_with_what_llama_cpp_reads_is_refused(
    tensors: dict[str, np.ndarray], keys: dict[str, Any], field: str, file: Path
) -> None:
    with pytest.raises(InputFileError, match=rf"disagree in {field};"):
        read(write(file, tensors, keys, record()))


def test_a_record_without_factor_tensors_is_refused(file: Path) -> None:
    with pytest.raises(InputFileError, match="no factor tensors"):
        read(write(file, {}, KEYS, record()))


def test_the_length_must_fit_the_dimension_count(file: Path) -> None:
    with pytest.raises(InputFileError, match=r"have 7 values, rope\.dimension_count needs 8"):
        read(write(file, SHORTER, KEYS))
    with pytest.raises(ScalingError, match="short_factor has 7 values"):
        read(write(file, {LONG_TENSOR: LONG, SHORT_TENSOR: SHORT[:-1]}, KEYS))


def test_step35_counts_twice_the_rotated_values(file: Path) -> None:
    found = read(write(file, BOTH, {**KEYS, "rope.dimension_count": 32}, architecture="step35"))
    assert plain(found) == record()


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        ({LONG_TENSOR: LONG.astype(np.float16)}, KEYS, "one F32 row"),
        ({LONG_TENSOR: LONG.reshape(2, 4)}, KEYS, "one F32 row"),
        ({LONG_TENSOR: np.ones(5000, np.float32)}, KEYS, "at most 2048"),
        ({LONG_TENSOR: np.zeros(0, np.float32)}, KEYS, "one F32 row"),
        ({LONG_TENSOR: LONG * 0}, KEYS, "greater than 0"),
        ({LONG_TENSOR: LONG * np.float32(np.nan)}, KEYS, "finite"),
        (BOTH, {**KEYS, "context_length": 128.0}, "context_length is missing or not"),
        (BOTH, {}, "context_length is missing or not"),
        (BOTH, {**KEYS, "rope.freq_base": 50000}, "rope.freq_base is not a FLOAT32"),
        (BOTH, {**KEYS, "rope.freq_base": float("nan")}, "rope_theta is nan"),
        (BOTH, {**KEYS, "rope.scaling.original_context_length": 256}, "max_position_embeddings is 128"),
    ],
)
def test_malformed_factors_are_refused(
    tensors: dict[str, np.ndarray], keys: dict[str, Any], message: str, file: Path
) -> None:
    with pytest.raises((InputFileError, ScalingError), match=message):
        read(write(file, tensors, keys))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"a":1,"a":1}', "[" * 100_000, "1" * 5000])
def test_a_malformed_record_is_refused(text: str, file: Path) -> None:
    with pytest.raises(ScalingError):
        read(write(file, BOTH, KEYS, text))


def test_a_record_of_another_type_is_refused(file: Path) -> None:
    path = write(file, BOTH, KEYS)
    writer = GGUFWriter(path, "llama")
    writer.add_uint32(RECORD_KEY, 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputFileError, match="not a string"):
        read(path)
