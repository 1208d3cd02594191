"""The doctor's findings in a real llama.cpp: the symptom is real, and `--fix` cures it."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from broken_gguf import change, renamed

from longrope_export import RopeScaling
from longrope_export.converters.doctor.examine import examine
from longrope_export.converters.doctor.repair import repair
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.encode import encode_entry, encode_head
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.demo import demo_model_path
from longrope_export.errors import RuntimeFailure
from longrope_export.files import sha256
from longrope_export.formats.gguf_header import align, read_gguf_header
from longrope_export.runtimes import llamacpp

LONG, SHORT, STATIC = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
TYPE, RECORD = "llama.rope.scaling.type", "longrope_export.scaling"
ORIGINAL, ATTENTION = "llama.rope.scaling.original_context_length", "llama.rope.scaling.attn_factor"
WINDOW = "llama.context_length"
SAME, OTHER = 1e-3, 0.03  # nats

Probabilities = npt.NDArray[np.float32]


def rewritten(path: Path, infos: Callable[[bytes], bytes], more_entries: bytes = b"", count: int = 0) -> Path:
    """`path` with its tensor table changed, or `count` more key-value pairs."""
    header, blob = read_gguf_header(path), path.read_bytes()
    head = encode_head(header.version, len(header.tensors), len(header.metadata) + count)
    head += blob[header.kv_start : header.kv_end] + more_entries + infos(blob[header.kv_end : header.infos_end])
    path.write_bytes(head.ljust(align(len(head), header.alignment), b"\0") + blob[header.data_start :])
    return path


def half_type(table: bytes) -> bytes:
    """The last tensor, 16 short factors in F32, as if it were F16 (its bytes are then 8 too many, which is allowed)."""
    return table[:-12] + struct.pack("<I", 1) + table[-8:]


_computed: dict[tuple[str, str], Probabilities] = {}


def run(path: Path, regime: str) -> Probabilities:
    """Next-token log-probabilities of a fixed prompt, below (short) or above (long) the original window of 256.

    Equal files are run once: a repaired file often has the bytes of another one.
    """
    key = sha256(path), regime
    if key not in _computed:
        length, context = {"short": (200, 256), "long": (400, 512)}[regime]
        prompt = [(7 * index * index + 3) % 290 + 2 for index in range(length)]
        _computed[key] = llamacpp.next_token_probabilities(path, [prompt], context=context)[0]
    return _computed[key]


def distance(left: Probabilities, right: Probabilities) -> float:
    return float(np.abs(left - right).max())


@dataclass
class Models:
    """A plain model, the same with factors, and what llama.cpp computes with them."""

    plain: Path
    good: Path
    scaling: RopeScaling
    probabilities: dict[str, Probabilities]


@pytest.fixture(scope="module")
def models(write_random_gguf: Callable[..., Path], record: Any, tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("runs")
    scaling = record(
        32, original_max_position_embeddings=256, max_position_embeddings=1024,
        long_attention_factor=1.0, short_attention_factor=1.0,
    )  # fmt: skip
    plain, good = write_random_gguf(folder / "plain.gguf"), folder / "good.gguf"
    patch_gguf(plain, good, scaling)
    change(plain, entries={WINDOW: 1024})  # a server accepts no more tokens than this
    switched = change(copied(good, folder / "switched.gguf"), vectors={LONG: scaling.short_factor})
    found = {f"{name} {regime}": run(path, regime) for name, path in (("plain", plain), ("good", good))
             for regime in ("short", "long")}  # fmt: skip
    return Models(plain, good, scaling, {**found, "short factors long": run(switched, "long")})


def copied(path: Path, target: Path) -> Path:
    target.write_bytes(path.read_bytes())
    return target


@pytest.fixture
def foreign(models: Models, tmp_path: Path) -> Path:
    """The model with factors as another tool would have written it."""
    return change(copied(models.good, tmp_path / "foreign.gguf"), removed=frozenset({RECORD}))


def finds(path: Path, name: str) -> bool:
    return any(found.rule.name == name for found in examine(path))


def test_the_comparisons_can_fail(models: Models) -> None:
    for regime in ("short", "long"):
        assert distance(models.probabilities[f"good {regime}"], models.probabilities[f"plain {regime}"]) > OTHER
    assert distance(models.probabilities["good long"], models.probabilities["short factors long"]) > OTHER


REFUSED: list[tuple[str, Callable[[Path], Path], str]] = [
    ("G04", lambda path: change(path, removed=frozenset({TYPE})), "wrong number of tensors"),
    ("G05", lambda path: change(path, entries={TYPE: "longrop"}), "GGML_ASSERT"),
    ("G06", lambda path: change(path, vectors={STATIC: (1.0,) * 16}), "wrong number of tensors"),
    ("G07", lambda path: rewritten(path, half_type), "GGML_ASSERT"),
    ("G08", lambda path: change(path, vectors={LONG: (1.0,) * 15}), "wrong shape"),
    ("G09", lambda path: change(path, vectors={LONG: (1.0,) * 15 + (0.0,)}), "NaN"),
    ("G15", lambda path: change(path, entries={WINDOW: 256}), r"available context size \(256"),
    ("G20", lambda path: change(path, entries={"llama.rope.dimension_count": 16}), "invalid n_rot"),
]


@pytest.mark.parametrize(("name", "spoil", "symptom"), REFUSED, ids=[row[0] for row in REFUSED])
def test_files_that_do_not_run(
    models: Models, foreign: Path, name: str, spoil: Callable[[Path], Path], symptom: str
) -> None:
    spoil(foreign)
    assert finds(foreign, name)
    with pytest.raises(RuntimeFailure, match=symptom):
        run(foreign, "long")
    repair(foreign, models.scaling)
    assert not finds(foreign, name)
    assert distance(run(foreign, "long"), models.probabilities["good long"]) < SAME


# finding, what breaks the file, the regime that shows it, and what llama.cpp computes instead
WRONG: list[tuple[str, Callable[[Path], Path], str, str | None]] = [
    ("G03", lambda path: change(path, dropped=frozenset({LONG, SHORT})), "long", "plain long"),
    ("G10", lambda path: change(path, vectors={LONG: tuple(1 / np.linspace(1, 8, 16))}), "long", None),
    ("G11", lambda path: change(path, entries={"llama.rope.scaling.factor": 4.0}), "long", None),
    ("G11", lambda path: change(path, entries={"llama.rope.scale_linear": 4.0}), "short", None),
    ("G12", lambda path: change(path, removed=frozenset({ORIGINAL})), "long", "short factors long"),
    ("G13", lambda path: change(path, entries={ORIGINAL: 2048}), "long", "short factors long"),
    ("G17", lambda path: change(path, entries={ATTENTION: 1.4}), "long", None),
    ("G19", lambda path: change(path, dropped=frozenset({SHORT})), "short", "plain short"),
    ("G19", lambda path: change(path, dropped=frozenset({LONG})), "long", "plain long"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spoil", "regime", "instead"), WRONG, ids=[f"{row[0]}-{n}" for n, row in enumerate(WRONG)]
)
def test_files_that_run_wrongly(
    models: Models, foreign: Path, name: str, spoil: Callable[[Path], Path], regime: str, instead: str | None
) -> None:
    spoil(foreign)
    assert finds(foreign, name)
    wrong = run(foreign, regime)
    if instead is None:
        assert distance(wrong, models.probabilities[f"good {regime}"]) > OTHER
    else:
        assert distance(wrong, models.probabilities[instead]) < SAME
    repair(foreign, models.scaling)
    assert distance(run(foreign, regime), models.probabilities[f"good {regime}"]) < SAME


def test_an_architecture_without_a_place_for_factors(models: Models, foreign: Path, tmp_path: Path) -> None:
    renamed(foreign, "qwen2")
    assert finds(foreign, "G01")
    with pytest.raises(RuntimeFailure, match="wrong number of tensors"):
        run(foreign, "long")
    repair(foreign)
    plain = renamed(copied(models.plain, tmp_path / "plain.gguf"), "qwen2")
    assert distance(run(foreign, "short"), run(plain, "short")) < SAME


def test_an_architecture_that_ignores_factors(models: Models, foreign: Path, tmp_path: Path) -> None:
    biases = {f"blk.{layer}.attn_output.bias": (0.0,) * 128 for layer in range(3)}  # which pangu-embedded must have
    change(renamed(foreign, "pangu-embedded"), vectors=biases)
    assert finds(foreign, "G02")
    plain = change(renamed(copied(models.plain, tmp_path / "plain.gguf"), "pangu-embedded"), vectors=biases)
    assert distance(run(foreign, "short"), run(plain, "short")) < SAME
    repair(foreign)
    assert not finds(foreign, "G02")
    assert distance(run(foreign, "short"), run(plain, "short")) < SAME


def test_a_padded_window_uses_the_long_factors(models: Models, foreign: Path) -> None:
    change(foreign, entries={ORIGINAL: 250})
    assert finds(foreign, "G14")
    whole = change(foreign, entries={ORIGINAL: 250}, vectors={SHORT: (3.0,) * 16})
    assert distance(run(whole, "short"), models.probabilities["good short"]) > OTHER
    assert (
        distance(
            run(change(whole, entries={ORIGINAL: 2}), "short"), run(change(whole, entries={ORIGINAL: 250}), "short")
        )
        < SAME
    )


def test_short_prompts_in_a_large_context_use_the_long_factors(models: Models, tmp_path: Path) -> None:
    assert finds(models.good, "G33")
    prompt = [(7 * index * index + 3) % 290 + 2 for index in range(200)]
    wide = llamacpp.next_token_probabilities(models.good, [prompt], context=512)[0]
    assert distance(wide, models.probabilities["good short"]) > OTHER
    long = change(copied(models.good, tmp_path / "long.gguf"), vectors={SHORT: models.scaling.long_factor})
    assert distance(wide, run(long, "short")) < SAME


def test_a_missing_attention_factor_is_one(models: Models, foreign: Path, record: Any) -> None:
    with_factor = record(32, original_max_position_embeddings=256, max_position_embeddings=1024, long_attention_factor=1.4,
                         short_attention_factor=1.4)  # fmt: skip
    right = run(repaired(foreign, ATTENTION, with_factor), "long")
    assert distance(right, models.probabilities["good long"]) > OTHER
    change(foreign, removed=frozenset({RECORD, ATTENTION}))
    assert finds(foreign, "G16")
    assert distance(run(foreign, "long"), models.probabilities["good long"]) < SAME
    repair(foreign, with_factor)
    assert distance(run(foreign, "long"), right) < SAME


def repaired(path: Path, missing: str, scaling: RopeScaling) -> Path:
    repair(change(path, removed=frozenset({missing})), scaling)
    return path


def test_a_missing_base_is_ten_thousand(models: Models, foreign: Path, record: Any) -> None:
    other = record(32, rope_theta=5e5, original_max_position_embeddings=256, max_position_embeddings=1024)
    change(foreign, entries={"llama.rope.freq_base": 5e5})
    repair(foreign, other)
    right = run(foreign, "long")
    change(foreign, removed=frozenset({"llama.rope.freq_base"}))
    assert finds(foreign, "G22")
    assert distance(run(foreign, "long"), right) > OTHER
    repair(foreign)
    assert distance(run(foreign, "long"), right) < SAME


def test_yarn_keys_are_ignored(models: Models, foreign: Path) -> None:
    change(foreign, entries={"llama.rope.scaling.yarn_ext_factor": 0.5, "llama.rope.scaling.yarn_beta_fast": 4.0})
    assert finds(foreign, "G23")
    assert distance(run(foreign, "long"), models.probabilities["good long"]) < SAME
    repair(foreign)
    assert not finds(foreign, "G23")


def test_granite_without_rope_or_scale(models: Models, foreign: Path) -> None:
    renamed(foreign, "granite", logit_scale=1.0)
    assert not finds(foreign, "G24")
    right = run(foreign, "long")
    change(foreign, entries={"granite.rope.scaling.finetuned": False})
    assert finds(foreign, "G24")
    assert distance(run(foreign, "long"), right) > OTHER
    repair(foreign)
    assert distance(run(foreign, "long"), right) < SAME
    change(foreign, removed=frozenset({"granite.logit_scale"}))
    assert finds(foreign, "G24")
    with pytest.raises(RuntimeFailure, match="logit_scale"):
        run(foreign, "long")


def pattern(values: list[bool]) -> bytes:
    key = b"step35.attention.sliding_window_pattern"
    return struct.pack("<Q", len(key)) + key + struct.pack(f"<IIQ{len(values)}?", 9, 7, len(values), *values)


def test_an_incomplete_step35(models: Models, foreign: Path) -> None:
    renamed(
        foreign, "step35", rope__dimension_count=64, block_count=4, nextn_predict_layers=1,
        attention__sliding_window=128, expert_feed_forward_length=256, attention__key_length=32, attention__value_length=32,
    )  # fmt: skip
    whole = foreign.read_bytes()
    rewritten(foreign, bytes, pattern([False, False, False, True]), 1)
    assert not finds(foreign, "G27")
    right = run(foreign, "long")
    change(foreign, entries={"step35.rope.dimension_count": 32})
    assert finds(foreign, "G27")
    with pytest.raises(RuntimeFailure, match="wrong shape"):
        run(foreign, "long")
    repair(foreign)
    assert distance(run(foreign, "long"), right) < SAME
    foreign.write_bytes(whole)
    rewritten(foreign, bytes, pattern([False, False, False, False]), 1)
    assert finds(foreign, "G27")
    with pytest.raises(RuntimeFailure, match=r"is_swa_any|GGML_ASSERT"):
        run(foreign, "long")


def test_phi3_with_a_gate_of_its_own(foreign: Path) -> None:
    renamed(foreign, "phi3")
    assert finds(foreign, "G28")
    with pytest.raises(RuntimeFailure, match=r"wrong shape|wrong number of tensors|missing tensor"):
        run(foreign, "long")


def test_offsets_with_holes_and_keys_twice(foreign: Path) -> None:
    whole = foreign.read_bytes()
    rewritten(foreign, lambda table: table[:-8] + struct.pack("<Q", struct.unpack("<Q", table[-8:])[0] + 32))
    assert finds(foreign, "G29")
    with pytest.raises(RuntimeFailure, match=r"has offset|failed|error"):
        run(foreign, "long")
    foreign.write_bytes(whole)
    rewritten(foreign, bytes, encode_entry("general.architecture", "llama"), 1)
    assert finds(foreign, "G31")
    with pytest.raises(RuntimeFailure, match=r"duplicate|failed|error"):
        run(foreign, "long")


def test_an_empty_array_stops_ggufs_own_tool(foreign: Path, tmp_path: Path) -> None:
    key = b"general.languages"
    rewritten(foreign, bytes, struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 0), 1)
    assert finds(foreign, "G32")
    tool = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force", "--general-name", "x", str(foreign)]
    assert subprocess.run([*tool, str(tmp_path / "a.gguf")], capture_output=True).returncode != 0
    repair(foreign)
    assert subprocess.run([*tool, str(tmp_path / "b.gguf")], capture_output=True).returncode == 0


def in_transformers_order(path: Path, heads: dict[str, int], size: int) -> Path:
    """`path`, whose rows stand in NORM order, as a converter would leave it that forgot to permute them."""
    header = read_gguf_header(path)
    order = np.arange(size).reshape(size // 2, 2).T.reshape(-1)
    rows = {}
    for info in header.tensors:
        count = heads.get(info.name.split(".")[-2], 0)
        if count and info.name.startswith("blk."):
            rows[info.name] = tuple(int(row) for row in (np.arange(count)[:, None] * size + order).reshape(-1))
    return change(path, rows=rows)


def test_rows_that_nobody_permuted(tmp_path: Path) -> None:
    convert_to_gguf(demo_model_path(), tmp_path / "demo.gguf", dtype="q8_0")
    right = (tmp_path / "demo.gguf").read_bytes()
    assert not finds(tmp_path / "demo.gguf", "G21")
    good = run(tmp_path / "demo.gguf", "short")
    in_transformers_order(tmp_path / "demo.gguf", {"attn_q": 4, "attn_k": 2}, 64)
    assert finds(tmp_path / "demo.gguf", "G21")
    assert distance(run(tmp_path / "demo.gguf", "short"), good) > OTHER
    repair(tmp_path / "demo.gguf")
    assert (tmp_path / "demo.gguf").read_bytes() == right


def test_rows_of_a_real_quantised_model(smollm2: Path, tmp_path: Path) -> None:
    assert examine(smollm2) == []
    in_transformers_order(copied(smollm2, tmp_path / "wrong.gguf"), {"attn_q": 9, "attn_k": 3}, 64)
    assert [found.rule.name for found in examine(tmp_path / "wrong.gguf")] == ["G21"]
    repair(tmp_path / "wrong.gguf")
    assert examine(tmp_path / "wrong.gguf") == []
    before, after = read_gguf_header(smollm2), read_gguf_header(tmp_path / "wrong.gguf")
    assert smollm2.read_bytes()[before.data_start :] == (tmp_path / "wrong.gguf").read_bytes()[after.data_start :]
