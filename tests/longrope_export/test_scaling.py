"""The record: validation, rounding, and one JSON form."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope_export import RopeScaling
from longrope_export.errors import LongRopeError, ScalingError

BASE: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rotary_dim": 4,
    "original_max_position_embeddings": 16,
    "max_position_embeddings": 64,
    "long_factor": [1.0, 3.3],
}
positive = st.floats(1e-6, 1e6)


@st.composite
def records(draw: st.DrawFn) -> RopeScaling:
    pairs = draw(st.integers(1, 8))
    factors = st.lists(positive, min_size=pairs, max_size=pairs)
    original = draw(st.integers(2, 1 << 20))
    return RopeScaling(
        rope_theta=draw(st.floats(1.0, 1e9)),
        rotary_dim=2 * pairs,
        original_max_position_embeddings=original,
        max_position_embeddings=original * draw(st.integers(1, 64)),
        long_factor=draw(factors),
        short_factor=draw(factors),
        long_attention_factor=draw(positive),
        short_attention_factor=draw(positive),
        long_start_tokens=draw(st.integers(0, 256)),
        short_start_tokens=draw(st.integers(0, 256)),
        sets=draw(st.dictionaries(st.integers(1, 1 << 20), factors, max_size=3)),
        provenance=draw(st.dictionaries(st.text(max_size=5), st.text(max_size=20) | st.integers(), max_size=3)),
    )


@given(records())
def test_json_round_trip_is_exact(record: RopeScaling) -> None:
    again = RopeScaling.from_json(record.to_json())
    assert again == record
    assert hash(again) == hash(record)
    assert pickle.loads(pickle.dumps(record)) == record == copy.deepcopy(record)


@given(records())
def test_reals_are_float32(record: RopeScaling) -> None:
    for value in (*record.long_factor, *record.short_factor, record.rope_theta, record.long_attention_factor):
        assert value == float(np.float32(value))


def test_defaults_keep_short_sequences_as_they_were() -> None:
    record = RopeScaling(**BASE)
    assert record.short_factor == (1.0, 1.0)
    assert record.long_attention_factor == record.short_attention_factor == 1.0
    assert record.factor == 4.0
    assert not record.is_static


def test_is_static_needs_every_part_equal() -> None:
    static = {**BASE, "short_factor": BASE["long_factor"]}
    assert RopeScaling(**static).is_static
    for change in ({"short_attention_factor": 1.1}, {"long_start_tokens": 1}, {"sets": {32: [1, 2]}}):
        assert not RopeScaling(**{**static, **change}).is_static


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_dim": 5}, "even"),
        ({"rotary_dim": 0}, "rotary_dim"),
        ({"rotary_dim": 4.0}, "whole number"),
        ({"long_factor": [1.0]}, "has 1 values"),
        ({"long_factor": 3.0}, "list of 2"),
        ({"long_factor": [1.0, 0.0]}, r"long_factor\[1\]"),
        ({"long_factor": [1.0, float("nan")]}, "finite"),
        ({"long_factor": [1.0, float("inf")]}, "finite"),
        ({"long_factor": [1.0, 1e300]}, "float32"),
        ({"long_factor": [1.0, -1.0]}, "greater than 0"),
        ({"long_factor": [1.0, 1e-60]}, "greater than 0"),
        ({"long_factor": ["a", 1.0]}, "float32"),
        ({"long_factor": ["4", 1.0]}, "must be a number"),
        ({"short_factor": [1.0, 2.0, 3.0]}, "short_factor has 3"),
        ({"max_position_embeddings": 15}, "max_position_embeddings is 15"),
        ({"original_max_position_embeddings": True}, "whole number"),
        ({"original_max_position_embeddings": 1}, "from 2"),
        ({"long_attention_factor": 0.0}, "long_attention_factor"),
        ({"short_attention_factor": True}, "short_attention_factor"),
        ({"long_start_tokens": -1}, "long_start_tokens"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"sets": {"x": [1.0, 1.0]}}, "length"),
        ({"sets": {32: [1.0]}}, r"sets\[32\]"),
        ({"sets": [1]}, "sets must"),
        ({"provenance": {"a": float("nan")}}, "provenance"),
        ({"provenance": {"a": object()}}, "provenance"),
    ],
)
def test_invalid_values_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ScalingError, match=message):
        RopeScaling(**{**BASE, **change})


def test_factors_below_one_and_not_monotonic_are_legal() -> None:
    assert RopeScaling(**{**BASE, "long_factor": [2.0, 0.5]}).long_factor == (2.0, 0.5)


@pytest.mark.parametrize("text", ["", "[]", "{", "{}", '{"format": "longrope-export/2"}', "[" * 100_000])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(LongRopeError):
        RopeScaling.from_json(text)


def test_unknown_missing_and_duplicate_keys_are_refused() -> None:
    values = RopeScaling(**BASE).to_dict()
    with pytest.raises(ScalingError, match="unknown keys: extra"):
        RopeScaling.from_dict({**values, "extra": 1})
    values.pop("rotary_dim")
    with pytest.raises(ScalingError, match="rotary_dim"):
        RopeScaling.from_dict(values)
    text = RopeScaling(**BASE).to_json().replace('"rotary_dim": 4,', '"rotary_dim": 4, "rotary_dim": 4,')
    with pytest.raises(ScalingError, match="duplicate"):
        RopeScaling.from_json(text)


def test_the_record_cannot_be_changed() -> None:
    record = RopeScaling(**BASE)
    with pytest.raises(AttributeError):
        record.rotary_dim = 8  # type: ignore[misc]
    with pytest.raises(TypeError):
        record.sets[1] = (1.0, 1.0)  # type: ignore[index]
    assert json.loads(record.to_json())["format"] == "longrope-export/1"
