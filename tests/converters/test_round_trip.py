"""Any record → each file format → `read_scaling` gives an equal record."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from longrope_export import RopeScaling
from longrope_export.converters.gguf.encode import encode_entry, encode_head, encode_tensor_info
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.converters.hf_config import extended_config, json_text
from longrope_export.converters.safetensors import write_safetensors_metadata
from longrope_export.formats.records import read_scaling

REALS = st.floats(min_value=2.0**-20, max_value=2.0**20, width=32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


@st.composite
def records(draw: st.DrawFn) -> RopeScaling:
    pairs = draw(st.integers(1, 64))
    window = draw(st.integers(2, 2**20))
    factors = st.lists(REALS, min_size=pairs, max_size=pairs)
    return RopeScaling(
        rope_theta=draw(REALS),
        rotary_dim=2 * pairs,
        original_max_position_embeddings=window,
        max_position_embeddings=draw(st.integers(window, 2**31 - 1)),
        long_factor=draw(factors),
        short_factor=draw(factors | st.just([])),
        long_attention_factor=draw(REALS),
        short_attention_factor=draw(REALS),
        long_start_tokens=draw(st.integers(0, 100)),
        short_start_tokens=draw(st.integers(0, 100)),
        sets=draw(st.dictionaries(st.integers(1, 2**20), factors, max_size=2)),
        provenance=draw(st.dictionaries(st.text(max_size=5), JSON, max_size=3)),
    )


def minimal_gguf(path: Path, scaling: RopeScaling) -> None:
    """The smallest llama GGUF that the record fits: three keys and one tensor."""
    entries = {
        "general.architecture": "llama",
        "llama.context_length": scaling.original_max_position_embeddings,
        "llama.rope.dimension_count": scaling.rotary_dim,
        "llama.rope.freq_base": scaling.rope_theta,
    }
    raw = encode_head(3, 1, len(entries)) + b"".join(encode_entry(key, value) for key, value in entries.items())
    raw += encode_tensor_info("t", (2,), 0, 0)
    path.write_bytes(raw.ljust(-(-len(raw) // 32) * 32, b"\0") + struct.pack("<2f", 1.0, 2.0))


def write_gguf(folder: Path, scaling: RopeScaling) -> Path:
    minimal_gguf(folder / "old.gguf", scaling)
    patch_gguf(folder / "old.gguf", folder / "new.gguf", scaling, allow_lossy=True)
    return folder / "new.gguf"


def write_safetensors(folder: Path, scaling: RopeScaling) -> Path:
    save_file({"t": np.zeros(2, np.float32)}, folder / "old.safetensors")
    entries = {"longrope_export.scaling": scaling.to_json()}
    write_safetensors_metadata(folder / "old.safetensors", folder / "new.safetensors", entries)
    return folder / "new.safetensors"


def config_for(scaling: RopeScaling, model_type: str, theta_key: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "head_dim": scaling.rotary_dim,
        "max_position_embeddings": scaling.original_max_position_embeddings,
        theta_key: scaling.rope_theta,
    }


def write_flat_config(folder: Path, scaling: RopeScaling) -> Path:
    config = extended_config(config_for(scaling, "llama", "rope_theta"), scaling)
    (folder / "config.json").write_text(json_text(config), encoding="utf-8")
    return folder / "config.json"


def write_nested_config(folder: Path, scaling: RopeScaling) -> Path:
    config = extended_config(config_for(scaling, "gemma3_text", "rope_theta"), scaling)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_record(folder: Path, scaling: RopeScaling) -> Path:
    (folder / "longrope.json").write_text(scaling.to_json(), encoding="utf-8")
    return folder


WRITERS = [write_gguf, write_safetensors, write_flat_config, write_nested_config, write_record]


@pytest.mark.parametrize("write", WRITERS)
@settings(max_examples=30, deadline=None)
@given(scaling=records())
def test_round_trip(write: Any, scaling: RopeScaling) -> None:
    with tempfile.TemporaryDirectory() as name:
        assert read_scaling(write(Path(name), scaling)) == scaling


@settings(max_examples=20, deadline=None)
@given(scaling=records())
def test_all_formats_in_one_folder_agree(scaling: RopeScaling) -> None:
    with tempfile.TemporaryDirectory() as name:
        for write in (write_gguf, write_safetensors, write_flat_config, write_record):
            write(Path(name), scaling)
        for old in ("old.gguf", "old.safetensors"):
            (Path(name) / old).unlink()
        assert read_scaling(name) == scaling
