"""The closed-form methods against published numbers, their options, composition, and their record."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope_export.errors import ScalingError
from longrope_export.rope import formulas
from longrope_export.rope.frequencies import inverse_frequencies, wavelengths
from longrope_export.rope.methods import (
    METHODS,
    Factors,
    method_factors,
)

LLAMA2: dict[str, Any] = {"rope_theta": 1e4, "rotary_dim": 128, "original_max_position_embeddings": 4096}
LLAMA3: dict[str, Any] = {"rope_theta": 5e5, "rotary_dim": 128, "original_max_position_embeddings": 8192}
PHI3: dict[str, Any] = {"rope_theta": 1e4, "rotary_dim": 96, "original_max_position_embeddings": 2048}


def factors(name: str, model: dict[str, Any], scale: float, **options: Any) -> Factors:
    target = round(model["original_max_position_embeddings"] * scale)
    return method_factors(name, **model, max_position_embeddings=target, **options)


# ---------------------------------------------------------------- published test vectors

LLAMA2_16K = {  # pair → λ per method; "llama3" with high_freq_factor 32 is the YaRN paper's NTK-by-parts
    "ntk": [1.192483, 1.587401, 2.022126, 2.411350, 2.691800, 4],
    "critical-dim": [1.279290, 1.908946, 2.678403, 3.426454, 3.996691, 6.956340],
    "yarn": [1, 1.029703, 1.529412, 2.363636, 3.586207, 4],
    "yarn-wavelength": [1, 1.115385, 2.384615, 3.307692, 3.884615, 4],
    "by-parts": [1, 1.006199, 2.607400, 3.627380, 3.998500, 4],
    "llama3": [1, 1, 1, 1.940349, 3.984556, 4],
}


@pytest.mark.parametrize("name", LLAMA2_16K)
def test_llama2_to_16k(name: str) -> None:
    options = {"high_freq_factor": 32.0} if name == "by-parts" else {}
    found = factors("llama3" if name == "by-parts" else name, LLAMA2, 4, **options).factors
    assert found[[8, 21, 32, 40, 45, 63]] == pytest.approx(np.array(LLAMA2_16K[name]), abs=6e-7)


@pytest.mark.parametrize(
    ("name", "scale", "values"),
    [
        ("yarn", 8, [1.114754, 1.446809, 2.615385, 5.666667, 8]),
        ("yarn-wavelength", 8, [1.823529, 3.470588, 5.941176, 7.588235, 8]),
        ("llama3", 8, [1, 1, 1.553415, 5.257327, 8]),
        ("ntk", 8, [1.935064, 2.208179, 2.691800, 3.071722, 3.174802]),
        ("yarn", 16, [1.123967, 1.494505, 2.956522, 8.5, 16]),
        ("yarn-wavelength", 16, [2.764706, 6.294118, 11.588235, 15.117647, 16]),
        ("llama3", 16, [1, 1, 1.617348, 7.554659, 16]),
    ],
)
def test_llama3_8b(name: str, scale: int, values: list[float]) -> None:
    assert factors(name, LLAMA3, scale).factors[[20, 24, 30, 34, 35]] == pytest.approx(np.array(values), abs=6e-7)


def test_phi3_mini_64x() -> None:
    pairs = [16, 24, 30, 31]
    frequency = factors("yarn", PHI3, 64).factors[pairs]
    assert frequency == pytest.approx(np.array([1.261411, 2.643478, 14.829268, 64]), abs=6e-7)
    wavelength = factors("yarn-wavelength", PHI3, 64).factors[pairs]
    assert wavelength == pytest.approx(np.array([14.263158, 40.789474, 60.684211, 64]), abs=6e-7)


def test_yarn_wavelength_llama2_32x() -> None:
    found = factors("yarn-wavelength", LLAMA2, 32).factors
    assert found[[21, 46]] == pytest.approx(np.array([2.192308, 32.0]), abs=6e-7)


def test_llama3_keeps_blends_and_divides_the_right_pairs() -> None:
    found = factors("llama3", LLAMA3, 8).factors
    assert ((found == 1).sum(), ((found > 1) & (found < 8)).sum(), (found == 8).sum()) == (29, 6, 29)


@pytest.mark.parametrize(
    ("model", "length", "ramp", "counts"),
    [
        (LLAMA2, 4096, (20, 46), (21, 25, 18)),
        (LLAMA3, 8192, (18, 35), (19, 16, 29)),
        (PHI3, 2048, (12, 31), (13, 18, 17)),
        (PHI3, 4096, (15, 34), (16, 18, 14)),
    ],
)
def test_yarn_ramp(model: dict[str, Any], length: int, ramp: tuple[int, int], counts: tuple[int, int, int]) -> None:
    periods = wavelengths(model["rope_theta"], model["rotary_dim"])
    assert formulas.yarn_ramp(periods, length) == ramp
    kept = formulas.yarn_kept_share(periods, length)
    assert ((kept == 1).sum(), ((kept > 0) & (kept < 1)).sum(), (kept == 0).sum()) == counts


@pytest.mark.parametrize(
    ("share", "frequency", "wavelength"),
    [(0.25, 3.37, 12.25), (0.5, 1.88, 8.5), (0.75, 1.31, 4.75)],
)
def test_the_two_blends_of_yarn(share: float, frequency: float, wavelength: float) -> None:
    assert formulas.frequency_blend(np.array([share]), 16)[0] == pytest.approx(frequency, abs=5e-3)
    assert formulas.wavelength_blend(np.array([share]), 16)[0] == pytest.approx(wavelength, abs=1e-12)


def test_new_bases() -> None:
    assert formulas.ntk_base(1e4, 128, 4) == pytest.approx(40889.942, abs=1e-3)
    assert formulas.ntk_base(1e4, 128, 32) == pytest.approx(338096.946, abs=1e-3)
    assert formulas.ntk_base(5e5, 128, 16) == pytest.approx(8359936.96, abs=1e-2)
    assert formulas.critical_dimension_base(1e4, 4096, 4 * 4096) == pytest.approx(71738.436, abs=1e-3)
    assert formulas.critical_dimension_base(1e4, 4096, 32 * 4096) == pytest.approx(1378414.28, abs=1e-2)
    assert formulas.critical_dimension_base(5e5, 8192, 16 * 8192) == pytest.approx(79760692.2, abs=1e-1)


@pytest.mark.parametrize(("factor", "length", "base"), [(1, 8192, 20221.2617), (2, 8192, 30527.7367), (2, 4096, 1e4)])
def test_dynamic_ntk_bases(factor: float, length: int, base: float) -> None:
    scale = formulas.dynamic_ntk_scale(length, 4096, factor)
    assert formulas.ntk_base(1e4, 128, scale) == pytest.approx(base, abs=1e-4)
    found = factors("dynamic-ntk", LLAMA2, 4, factor=factor, current_length=length).factors
    assert inverse_frequencies(1e4, 128, found) == pytest.approx(inverse_frequencies(base, 128), rel=1e-8)


def test_divisors_and_new_bases_are_the_same_thing() -> None:
    for name, base in (("ntk", 40889.942), ("critical-dim", 71738.436)):
        found = inverse_frequencies(1e4, 128, factors(name, LLAMA2, 4).factors)
        assert found == pytest.approx(inverse_frequencies(base, 128), rel=1e-7)


@pytest.mark.parametrize(
    ("scale", "length", "value"),
    [
        (16, 8192, 1.143544),
        (32, 4096, 1.190238),
        (64, 2048, 1.243163),
        (4, 4096, 1.080123),
        (8, 8192, 1.109400),
    ],
)
def test_longrope_attention_factor(scale: float, length: int, value: float) -> None:
    assert formulas.longrope_attention_factor(scale, length) == pytest.approx(value, abs=6e-7)


@pytest.mark.parametrize(
    ("scale", "value"), [(4, 1.138629), (8, 1.207944), (16, 1.277259), (32, 1.346574), (64, 1.415888)]
)
def test_yarn_attention_factor(scale: float, value: float) -> None:
    assert factors("yarn", LLAMA2, scale).attention_factor == pytest.approx(value, abs=6e-7)
    assert factors("yarn-wavelength", LLAMA2, scale).attention_factor == pytest.approx(value, abs=6e-7)


def test_longrope2_below_the_critical_index() -> None:
    """The low part of the factors released for Llama-3-8B at 128k: λ_33 = 21.81 gives 21.81^(i/33)."""
    tail = np.linspace(21.81, 26.05, 31)
    found = factors("longrope2", LLAMA3, 16, critical_index=33, tail=tail.tolist())
    expected = [1.0, 1.097906416, 1.205398499, 19.865081, 21.81, 26.05]
    assert found.factors[[0, 1, 2, 32, 33, 63]] == pytest.approx(np.array(expected), abs=6e-7)
    assert found.attention_factor == pytest.approx(1.143544, abs=6e-7)


def test_longrope2_without_options_divides_by_s_from_the_critical_dimension_up() -> None:
    found = factors("longrope2", LLAMA3, 16).factors
    assert found[34] == pytest.approx(16 ** (34 / 35))
    assert (found[35:] == 16.0).all()


def test_resonance_rounds_wavelengths_to_whole_tokens() -> None:
    plain = wavelengths(1e4, 128)
    rounded = plain * formulas.resonance(plain, np.ones(64))
    assert rounded[[1, 8, 16, 32, 63]] == pytest.approx(np.array([7.0, 20.0, 63.0, 628.0, 54410.0]), rel=1e-14)
    with_option = factors("yarn", LLAMA2, 4, resonance=True).factors * plain
    assert with_option == pytest.approx(np.rint(factors("yarn", LLAMA2, 4).factors * plain), rel=1e-14)


def test_other_attention_factors_are_one() -> None:
    names = ("pi", "ntk", "dynamic-ntk", "llama3", "critical-dim")
    assert {name: factors(name, LLAMA2, 4).attention_factor for name in names} == dict.fromkeys(names, 1.0)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("yarn", {"beta_fast": 16.0}),
        ("yarn", {"beta_slow": 2.0}),
        ("yarn", {"truncate": False}),
        ("yarn-wavelength", {"beta_fast": 16.0}),
        ("yarn-wavelength", {"beta_slow": 2.0}),
        ("yarn-wavelength", {"truncate": False}),
        ("llama3", {"low_freq_factor": 2.0}),
        ("llama3", {"high_freq_factor": 8.0}),
        ("dynamic-ntk", {"factor": 2.0}),
        ("dynamic-ntk", {"current_length": 6000}),
        ("longrope2", {"critical_index": 33}),
        ("longrope2", {"tail": 5.0}),
        ("pi", {"resonance": True}),
    ],
)
def test_every_option_changes_the_factors(name: str, options: dict[str, Any]) -> None:
    plain, changed = factors(name, LLAMA2, 4).factors, factors(name, LLAMA2, 4, **options).factors
    assert np.abs(plain - changed).max() > 1e-3


def test_the_option_list_above_is_complete() -> None:
    tested = {
        ("yarn", "beta_fast"), ("yarn", "beta_slow"), ("yarn", "truncate"),
        ("yarn-wavelength", "beta_fast"), ("yarn-wavelength", "beta_slow"), ("yarn-wavelength", "truncate"),
        ("llama3", "low_freq_factor"), ("llama3", "high_freq_factor"), ("dynamic-ntk", "factor"),
        ("dynamic-ntk", "current_length"), ("longrope2", "critical_index"), ("longrope2", "tail"),
        ("abf", "new_rope_theta"),
    }  # fmt: skip
    assert {(name, option) for name, method in METHODS.items() for option in method.options} == tested


def test_abf_is_another_base() -> None:
    found = inverse_frequencies(1e4, 128, factors("abf", LLAMA2, 8, new_rope_theta=5e5).factors)
    assert found == pytest.approx(inverse_frequencies(5e5, 128), rel=1e-12)


def test_attention_factor_can_be_set_for_any_method() -> None:
    assert factors("ntk", LLAMA2, 4, attention_factor=1.05).attention_factor == 1.05
    assert factors("yarn", LLAMA2, 4, attention_factor=1.0).attention_factor == 1.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {}, "no method 'linear'; choose one of pi, ntk"),
        ("pi", {"beta_fast": 3}, "pi has no option beta_fast; its options: resonance"),
        ("yarn", {"betafast": 3}, "its options: beta_fast, beta_slow, truncate"),
        ("yarn", {"beta_fast": 0.5}, "beta_slow"),
        ("yarn", {"beta_slow": 0.0}, "beta_slow"),
        ("yarn", {"beta_fast": "fast"}, "options of yarn are not usable"),
        ("yarn", {"attention_factor": 0.0}, "attention_factor"),
        ("yarn", {"attention_factor": math.nan}, "attention_factor"),
        ("llama3", {"high_freq_factor": 1.0}, "low_freq_factor"),
        ("abf", {}, "give new_rope_theta"),
        ("abf", {"new_rope_theta": 5e3}, "at least 10000"),
        ("abf", {"new_rope_theta": math.inf}, "new_rope_theta"),
        ("dynamic-ntk", {"factor": 0.5}, "at least 1"),
        ("longrope2", {"critical_index": 64}, "from 0 to 63"),
        ("longrope2", {"critical_index": -1}, "from 0 to 63"),
        ("longrope2", {"tail": 3.9}, "at least 4"),
        ("longrope2", {"critical_index": 60, "tail": [4.0, 5.0]}, "tail has 2 values"),
        ("longrope2", {"tail": "long"}, "options of longrope2 are not usable"),
    ],
)
def test_wrong_options_are_refused_in_one_line(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScalingError, match=message) as caught:
        factors(name, LLAMA2, 4, **options)
    assert "\n" not in str(caught.value)


def test_a_shrinking_window_is_refused() -> None:
    with pytest.raises(ScalingError, match="from 4096 to 2048"):
        factors("pi", LLAMA2, 0.5)


@pytest.mark.parametrize("name", ["ntk", "yarn", "critical-dim", "longrope2", "dynamic-ntk"])
def test_one_pair_is_too_few_for_methods_that_tell_pairs_apart(name: str) -> None:
    model = {"rope_theta": 1e4, "rotary_dim": 2, "original_max_position_embeddings": 64}
    with pytest.raises(ScalingError, match="use pi"):
        factors(name, model, 2)
    assert factors("pi", model, 2).factors.tolist() == [2.0]


def test_a_window_below_every_period_has_no_critical_dimension() -> None:
    model = {"rope_theta": 1e4, "rotary_dim": 64, "original_max_position_embeddings": 4}
    with pytest.raises(ScalingError, match="no critical dimension"):
        factors("critical-dim", model, 2)
    with pytest.raises(ScalingError, match="no critical dimension"):
        formulas.critical_dimension_base(1e4, 4, 8)


# ---------------------------------------------------------------- properties

models = st.fixed_dictionaries(
    {
        "rope_theta": st.floats(100.0, 1e7),
        "rotary_dim": st.integers(2, 128).map(lambda pairs: 2 * pairs),
        "original_max_position_embeddings": st.integers(16, 2**18),
    }
)
scales = st.sampled_from([1, 2, 3, 4, 8, 16, 64])
CLOSED = [name for name in METHODS if name != "abf"]


@given(model=models, scale=scales, name=st.sampled_from(CLOSED))
def test_factors_are_finite_at_least_one_and_never_fall(model: dict[str, Any], scale: int, name: str) -> None:
    found = factors(name, model, scale).factors
    assert found.shape == (model["rotary_dim"] // 2,)
    assert np.isfinite(found).all()
    assert (found >= 1.0 - 1e-12).all()
    assert (np.diff(found) >= -1e-9 * found[1:]).all()


@given(model=models, scale=scales)
def test_ntk_goes_from_one_to_s(model: dict[str, Any], scale: int) -> None:
    found = factors("ntk", model, scale).factors
    assert found[0] == 1.0
    assert found[-1] == pytest.approx(scale)


@given(model=models, scale=scales, name=st.sampled_from(["yarn", "yarn-wavelength", "llama3", "pi"]))
def test_by_parts_methods_never_exceed_s(model: dict[str, Any], scale: int, name: str) -> None:
    assert (factors(name, model, scale).factors <= scale * (1 + 1e-12)).all()


@given(model=models, name=st.sampled_from(CLOSED))
def test_no_extension_is_the_identity(model: dict[str, Any], name: str) -> None:
    found = factors(name, model, 1)
    assert found.factors == pytest.approx(np.ones(model["rotary_dim"] // 2), rel=1e-12)
    assert found.attention_factor == 1.0


@given(model=models, scale=scales)
def test_wavelength_blend_is_never_below_frequency_blend(model: dict[str, Any], scale: int) -> None:
    assert (factors("yarn-wavelength", model, scale).factors >= factors("yarn", model, scale).factors - 1e-9).all()


# ---------------------------------------------------------------- the table and its documentation


def test_every_method_has_a_description_and_a_reference() -> None:
    expected = {
        "pi",
        "ntk",
        "dynamic-ntk",
        "yarn",
        "yarn-wavelength",
        "llama3",
        "abf",
        "critical-dim",
        "longrope2",
    }
    assert set(METHODS) == expected
    for name, method in METHODS.items():
        assert name == method.name
        assert "\n" not in method.description
        assert any(word in method.reference for word in ("arXiv", "transformers", "microsoft/LongRoPE"))


DOCUMENT = (Path(__file__).parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")


def test_the_documentation_lists_every_method_option_and_reference() -> None:
    table = DOCUMENT.split("##")[0].splitlines()
    rows = {line.split("|")[1].strip(" `"): line for line in table if line.startswith("| `")}
    assert set(rows) == set(METHODS)
    for name, method in METHODS.items():
        assert method.reference in rows[name]
        if name != "yarn-wavelength":  # its row says "as `yarn`"
            assert all(f"`{option}`" in rows[name] for option in method.options), name


def test_the_documented_example_prints_what_the_document_shows(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    shown = re.search(r"```text\n(.*?)```", DOCUMENT, re.DOTALL)
    assert code is not None
    assert shown is not None
    exec(code[1], {})
    assert capsys.readouterr().out == shown[1]
