"""Which factors a row gives a length, how rows are named, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling
from longrope_export.description import ModelDescription, describe
from longrope_export.errors import InputFileError, ScalingError
from longrope_export.evaluation.rows import ModelRow, RowOptions, build_rows
from longrope_export.rope.methods import method_scaling

WINDOW = 32
LONG, SHORT = tuple(map(float, np.linspace(1, 4, 16))), tuple(map(float, np.linspace(1, 2, 16)))


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> ModelDescription:
    return describe(tiny_llama)


def record(**changes: Any) -> RopeScaling:
    values: dict[str, Any] = {
        "rope_theta": 10000.0, "rotary_dim": 32, "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": 128, "long_factor": LONG, "short_factor": SHORT, "long_attention_factor": 1.25,
        "short_attention_factor": 1.125, "long_start_tokens": 4,
    }  # fmt: skip
    return RopeScaling(**{**values, **changes})


def row(model: ModelDescription, scaling: RopeScaling | None, **options: Any) -> ModelRow:
    return ModelRow("row", model, "record", scaling, 128, **options)


def labels(entry: ModelRow) -> list[str]:
    return [entry.factor_set(length).label for length in (WINDOW, WINDOW + 1)]


def test_a_record_switches_at_the_window_unless_told_otherwise(model: ModelDescription) -> None:
    assert labels(row(model, record())) == ["short", "long"]
    assert labels(row(model, record(), switch="long")) == ["long", "long"]
    assert labels(row(model, record(), switch="short")) == ["short", "short"]
    assert labels(row(model, record(), switch="context", context=WINDOW)) == ["short", "short"]
    assert labels(row(model, record(), switch="context", context=WINDOW + 1)) == ["long", "long"]
    for side in ("short", "long"):
        assert row(model, record()).factor_set(64, side).label == side  # type: ignore[arg-type]


def test_a_set_has_the_numbers_of_its_side(model: ModelDescription) -> None:
    entry = row(model, record())
    long, short = entry.factor_set(64), entry.factor_set(8)
    assert long.factors == record().long_factor
    assert short.factors == record().short_factor
    assert (long.attention_factor, long.start_tokens) == (1.25, 4)
    assert (short.attention_factor, short.start_tokens) == (1.125, 0)


def test_further_short_sets_apply_by_length(model: ModelDescription) -> None:
    entry = row(model, record(sets={8: (1.5,) * 16, 16: (1.25,) * 16}))
    assert [entry.factor_set(n).label for n in (8, 9, 16, 17, 32)] == [
        "sets[8]", "sets[16]", "sets[16]", "short", "short"
    ]  # fmt: skip
    assert entry.factor_set(16).factors == (1.25,) * 16


def test_a_static_record_is_one_set(model: ModelDescription) -> None:
    static = method_scaling(
        "pi", rope_theta=10000.0, rotary_dim=32, original_max_position_embeddings=WINDOW, max_position_embeddings=128
    )
    entry = row(model, static)
    assert {entry.factor_set(8).label, entry.factor_set(64).label, entry.factor_set(8, "long").label} == {"static"}


def test_dynamic_ntk_has_a_set_for_every_length_beyond_the_window(model: ModelDescription) -> None:
    (entry,) = build_rows([model], RowOptions(methods=("dynamic-ntk",)), 128)
    assert [entry.factor_set(n).label for n in (8, WINDOW, 64, 128)] == ["short", "short", "dynamic@64", "dynamic@128"]
    assert entry.factor_set(WINDOW).factors == (1.0,) * 16
    ntk = method_scaling(
        "ntk", rope_theta=10000.0, rotary_dim=32, original_max_position_embeddings=WINDOW, max_position_embeddings=64
    )
    assert entry.factor_set(64).factors == ntk.long_factor
    assert entry.factor_set(8, "long").label == "dynamic@128"
    assert entry.factor_set(128, "short").label == "short"


def test_a_model_s_own_dynamic_ntk_is_followed_too(model: ModelDescription) -> None:
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    own = replace(model, rope_type="dynamic", rope_parameters=parameters)
    (entry,) = build_rows([own], RowOptions(), 128)
    assert entry.factor_set(WINDOW).label == "own"
    scale = 2.0 * 64 / WINDOW - 1.0
    expected = scale ** (np.arange(16) * 2 / (32 - 2))
    np.testing.assert_allclose(entry.factor_set(64).factors or (), expected, rtol=1e-6)


def test_unchanged_is_what_the_file_carries_and_plain_is_without_it(model: ModelDescription) -> None:
    assert build_rows([model], RowOptions(), 64)[0].factor_set(64).factors is None
    extended = replace(model, scaling=record())
    unchanged, plain = build_rows([extended], RowOptions(methods=("unchanged", "plain")), 64)
    assert unchanged.factor_set(64).factors == record().long_factor
    assert plain.factor_set(64).factors == (1.0,) * 16
    assert (unchanged.is_reference, plain.is_reference) == (False, True)


def test_rows_are_named_after_methods_files_and_models(model: ModelDescription, tmp_path: Path) -> None:
    path = tmp_path / "searched.json"
    path.write_text(record().to_json())
    options = RowOptions(methods=("unchanged", "pi"), scalings=(path,), target=256)
    rows = build_rows([model], options, 128)
    assert [entry.name for entry in rows] == ["unchanged", "pi", "searched"]
    assert rows[1].scaling is not None
    assert rows[1].scaling.max_position_embeddings == 256
    tuned = replace(model, path=str(tmp_path / "tuned"))
    both = build_rows([model, tuned], options, 128)
    assert [entry.name for entry in both][2:5] == ["llama: searched", "tuned", "tuned: pi"]
    assert both[3].is_reference


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"methods": ("pi", "pi")}, ScalingError, "two rows would be called 'pi'"),
        ({"methods": ("nothing",)}, ScalingError, "no method 'nothing'"),
        ({"scalings": (Path("missing.json"),)}, InputFileError, r"missing\.json does not exist"),
        ({"switch": "long"}, ScalingError, "there is none; give --scaling"),
    ],
)
def test_rows_that_cannot_be_are_refused(
    model: ModelDescription, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_rows([model], RowOptions(**options), 64)


def test_a_record_of_another_model_is_refused(model: ModelDescription, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(record(rotary_dim=16, long_factor=(2.0,) * 8, short_factor=()).to_json())
    shutil.copy(path, tmp_path / "pi")
    with pytest.raises(ScalingError, match="made for another model"):
        build_rows([model], RowOptions(scalings=(path,)), 64)
