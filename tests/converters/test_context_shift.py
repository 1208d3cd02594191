"""A context shift in a real llama.cpp: it doubles a llama's attention factor on cached keys, and leaves granite's exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from context_shift import shift_errors

from longrope_export import RopeScaling
from longrope_export.converters.doctor.examine import examine
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.embed import embed
from longrope_export.converters.gguf.rewrite import GgufChanges, rewrite_gguf
from longrope_export.formats.gguf_header import read_gguf_header

pytestmark = pytest.mark.usefixtures("quiet")
EXACT, WRONG = 1e-3, 0.03  # nats
NAMES = ("llama", "one", "granite")
SHIFTS = ("16", "16,-16")
SCALE, FACTOR = "granite.attention.scale", "granite.rope.scaling.attn_factor"


@pytest.fixture(scope="module")
def files(small_llama: Path, record: Callable[..., RopeScaling], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One model as llama and as granite with an attention factor of 1.1, and as llama with none."""
    folder, scaling = tmp_path_factory.mktemp("shift"), record(32)
    one = replace(scaling, long_attention_factor=1.0, short_attention_factor=1.0)
    convert_to_gguf(small_llama, folder / "llama.gguf", scaling, dtype="f32")
    convert_to_gguf(small_llama, folder / "one.gguf", one, dtype="f32")
    embed(folder / "llama.gguf", folder / "granite.gguf", scaling, architecture="granite")
    return folder


def test_granite_stays_exact_where_a_llama_with_an_attention_factor_does_not(files: Path) -> None:
    once, twice = shift_errors(files / "llama.gguf", 1024, *SHIFTS)
    assert once > WRONG
    assert twice > 1.5 * once  # there and back again: the error grows
    for name in ("one", "granite"):
        assert max(shift_errors(files / f"{name}.gguf", 1024, *SHIFTS)) < EXACT
    advice = {name: {found.rule.name: found.advice for found in examine(files / f"{name}.gguf")} for name in NAMES}
    assert [name for name, rules in advice.items() if "G18" in rules] == ["llama"]
    assert "--as granite" in advice["llama"]["G18"]


def test_the_same_factor_in_granite_s_own_key_would_not_be_exact(files: Path, tmp_path: Path) -> None:
    """What makes it exact is that the factor stands in the softmax scale, not the architecture's name."""
    entries = {FACTOR: 1.1, SCALE: 32**-0.5}
    rewrite_gguf(read_gguf_header(files / "granite.gguf"), tmp_path / "key.gguf", GgufChanges(entries=entries))
    assert shift_errors(tmp_path / "key.gguf", 1024, "16")[0] > WRONG
