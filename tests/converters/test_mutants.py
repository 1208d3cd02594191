"""The checks of conversions, stand-ins, approximations and imports: each fails on a product that is wrong in one way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import write_random_model

from longrope_export import RopeScaling
from longrope_export.converters.approximation_cost import approximated_record
from longrope_export.converters.gguf.approximate import approximation
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.embed import embed
from longrope_export.converters.gguf.rewrite import GgufChanges, rewrite_gguf
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.converters.imports.config_scaling import scaling_from_any_config
from longrope_export.formats.gguf_header import GgufHeader, read_gguf_header
from longrope_export.formats.gguf_tensors import read_tensor
from longrope_export.rope.frequencies import inverse_frequencies
from longrope_export.runtimes import llamacpp

pytestmark = pytest.mark.usefixtures("quiet")
Record = Callable[..., RopeScaling]
BOUND = 1e-3  # nats, F32 against F32
LONG, SHORT, STATIC = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
# prompt length and allocated context: above the window of 512, where the long factors apply, and below
ABOVE, BELOW = (700, 1024), (300, 512)

# name → what becomes of the long and the short list
FACTOR_MUTANTS: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "dropped": lambda long, short: (np.ones_like(long), np.ones_like(short)),
    "halved": lambda long, short: (long / 2, short / 2),
    "shuffled": lambda long, short: (np.roll(long, 3), np.roll(short, 3)),
    "swapped": lambda long, short: (short, long),
}
ROTARY = {"phi3": 24}
OWN: dict[str, dict[str, Any]] = {
    "phi3": {"partial_rotary_factor": 0.75, "pad_token_id": 0, "original_max_position_embeddings": 512, "resid_pdrop": 0.0},
    "granite": {"attention_multiplier": 0.2, "attention_bias": True},
    "llama": {"attention_bias": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digit_tokenizer: Any, small_config: dict[str, Any]) -> Any:
    """Builder of a random model folder of a family, biases included, each built once."""
    made: dict[str, Path] = {}

    def build(family: str, *, biased: bool = True) -> Path:
        name = f"{family}{biased}"
        if name not in made:
            config = {**small_config, **(OWN.get(family, {}) if biased else {})}
            made[name] = write_random_model(tmp_path_factory.mktemp("mutants") / name, family, config, digit_tokenizer)
        return made[name]

    return build


def expected(source: Path, place: Path, scaling: RopeScaling, length: int) -> Any:
    """transformers' log-probabilities behind the prompt, with the record."""
    import torch
    from transformers import AutoModelForCausalLM

    if not place.exists():
        write_hf_folder(source, place, scaling)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(place)(torch.tensor([prompt(length)]), use_cache=False).logits
    return logits[0, -1].log_softmax(-1).numpy()


def prompt(length: int) -> list[int]:
    return [(7 * index * index + 3) % 590 + 2 for index in range(length)]


def computed(path: Path, length: int, context: int) -> Any:
    return llamacpp.next_token_probabilities(path, [prompt(length)], context=context)[0]


def mutants(header: GgufHeader) -> dict[str, GgufChanges]:
    """Ways in which a converted file could be wrong: its factors, its attention factor, its rows."""
    names = [name for name in (LONG, SHORT, STATIC) if header.tensor(name)]
    values = [read_tensor(header, name) for name in names]
    found = {}
    for name, change in FACTOR_MUTANTS.items():
        if len(values) == 2:
            found[name] = vectors(dict(zip(names, change(*values), strict=True)))
        elif name != "swapped":
            found[name] = vectors({names[0]: change(values[0], values[0])[0]})
    architecture = header.get("general.architecture")
    for key in (f"{architecture}.rope.scaling.attn_factor", f"{architecture}.attention.scale"):
        if key in header.metadata:
            found[key] = GgufChanges(entries={key: float(header.get(key)) / 1.1})
    rows = {info.name: moved(header, info.name) for info in header.tensors if rotated(info.name)}
    found["rows"] = GgufChanges(rows={name: order for name, order in rows.items() if name.endswith("weight")})
    if biases := {name: order for name, order in rows.items() if name.endswith("bias")}:
        found["biases"] = GgufChanges(rows=biases)
    return found


def vectors(values: dict[str, Any]) -> GgufChanges:
    return GgufChanges(vectors={name: tuple(map(float, factors)) for name, factors in values.items()})


def rotated(name: str) -> bool:
    return any(part in name for part in (".attn_q.", ".attn_k.", ".attn_qkv."))


def moved(header: GgufHeader, name: str) -> tuple[int, ...]:
    """The rows once more from pairs (i, i + d/2) to pairs (2i, 2i + 1): permuted twice, or where they must not be."""
    info = header.tensor(name)
    assert info is not None
    rows, size = info.shape[-1], 32
    turned = 4 * size if ".attn_qkv." in name else rows
    order = [start + pair + half * (size // 2) for start in range(0, turned, size) for pair in range(size // 2)
             for half in range(2)]  # fmt: skip
    return (*order, *range(turned, rows))


def check_mutants(path: Path, wanted: Any, place: tuple[int, int]) -> set[str]:
    """The product passes, every mutant of it fails by far; their names."""
    header = read_gguf_header(path)
    assert np.abs(computed(path, *place) - wanted).max() < BOUND
    found = mutants(header)
    for name, changes in found.items():
        wrong = path.with_name("mutant.gguf")
        rewrite_gguf(header, wrong, changes, overwrite=True)
        assert np.abs(computed(wrong, *place) - wanted).max() > 20 * BOUND, name
    return set(found)


SLOW = pytest.mark.slow
PRODUCTS = [
    ("qwen2", None, "llama"),
    pytest.param("llama", None, "llama", marks=SLOW),
    pytest.param("phi3", None, "phi3", marks=SLOW),
    pytest.param("granite", None, "granite", marks=SLOW),
    pytest.param("qwen2", "phi3", "phi3", marks=SLOW),
    pytest.param("qwen2", "granite", "granite", marks=SLOW),
    pytest.param("qwen3", "step35", "step35", marks=SLOW),
]


@pytest.mark.parametrize("place", [ABOVE, pytest.param(BELOW, marks=SLOW)])
@pytest.mark.parametrize(("family", "architecture", "written"), PRODUCTS)
def test_a_wrong_conversion_is_told_from_a_right_one(
    folder: Any, record: Record, tmp_path: Path, family: str, architecture: str | None, written: str,
    place: tuple[int, int],
) -> None:  # fmt: skip
    source, scaling = folder(family), record(ROTARY.get(family, 32))
    convert_to_gguf(source, tmp_path / "m.gguf", scaling, dtype="f32", architecture=architecture)
    assert read_gguf_header(tmp_path / "m.gguf").get("general.architecture") == written
    names = check_mutants(tmp_path / "m.gguf", expected(source, tmp_path / "hf", scaling, place[0]), place)
    assert {*FACTOR_MUTANTS, "rows"} < names
    assert ("biases" in names) == (family not in ("phi3", "qwen3"))


@pytest.mark.slow
def test_a_wrong_static_set_is_told_from_a_right_one(folder: Any, record: Record, tmp_path: Path) -> None:
    source, scaling = folder("qwen2"), record(32)
    convert_to_gguf(source, tmp_path / "m.gguf", scaling, dtype="f32", static=True, allow_lossy=True)
    one = replace(scaling, short_factor=scaling.long_factor)
    names = check_mutants(tmp_path / "m.gguf", expected(source, tmp_path / "hf", one, 300), BELOW)
    assert {"dropped", "halved", "shuffled", "rows", "biases"} < names


@pytest.mark.slow
@pytest.mark.parametrize("method", ["yarn", "linear", "base"])
def test_a_wrong_approximation_is_told_from_a_right_one(
    folder: Any, record: Record, tmp_path: Path, method: str
) -> None:
    source, scaling, plain = folder("qwen2"), record(32), tmp_path / "plain.gguf"
    convert_to_gguf(source, plain, dtype="f32")
    embed(plain, tmp_path / "m.gguf", scaling, approximate=method, allow_lossy=True)
    wanted = expected(source, tmp_path / "hf", approximated_record(scaling, method), ABOVE[0])
    assert np.abs(computed(tmp_path / "m.gguf", *ABOVE) - wanted).max() < BOUND
    header, own = read_gguf_header(tmp_path / "m.gguf"), approximation(method, scaling).keys
    wrong = [GgufChanges(removed=frozenset({"qwen2.rope.scaling.attn_factor"}))]
    for key in ("rope.scaling.factor", "rope.freq_base") if method != "base" else ("rope.freq_base",):
        wrong.append(GgufChanges(entries={f"qwen2.{key}": float(own[key]) / 2}))
    for changes in wrong:
        rewrite_gguf(header, tmp_path / "wrong.gguf", changes, overwrite=True)
        assert np.abs(computed(tmp_path / "wrong.gguf", *ABOVE) - wanted).max() > 20 * BOUND, changes


RISING = [1.0, 1.01, 1.2, 1.69, 2.5, 8.0, 29.16, 32.0]
SIZES: dict[str, Any] = {
    "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 8,
    "max_position_embeddings": 16384, "rope_theta": 10000.0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 1024},
    "longrope": {"rope_type": "longrope", "long_factor": RISING, "short_factor": [1.0, 1.1] * 4,
                 "original_max_position_embeddings": 4096, "factor": 4.0},
}  # fmt: skip


def equals_transformers(scaling: RopeScaling, parameters: dict[str, Any]) -> bool:
    """Whether both sets and the attention factor are those that transformers applies below and above the window."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**SIZES, rope_parameters={"rope_theta": 10000.0, **parameters})
    original, same = inverse_frequencies(10000.0, 16), True
    for length, factors in ((100, scaling.short_factor), (10000, scaling.long_factor)):
        initialise = ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
        theirs, attention = initialise(config, "cpu", seq_len=length)
        same &= bool(np.allclose(original / np.array(factors), theirs.numpy(), rtol=1e-6, atol=0))
        same &= scaling.long_attention_factor == pytest.approx(attention, rel=1e-6)
    return same


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_wrong_import_is_told_from_a_right_one(kind: str) -> None:
    parameters = CONFIGS[kind]
    values = {"model_type": "llama", **SIZES, "rope_scaling": parameters}
    found = scaling_from_any_config(values, original=None, window=65536)
    assert equals_transformers(found, parameters)
    for name, change in FACTOR_MUTANTS.items():
        long, short = change(np.array(found.long_factor), np.array(found.short_factor))
        wrong = replace(found, long_factor=tuple(long.tolist()), short_factor=tuple(short.tolist()))
        harmless = wrong == found  # swapping equal lists, rolling constant ones
        assert harmless == (found.is_static and (name == "swapped" or (kind, name) == ("linear", "shuffled")))
        assert equals_transformers(wrong, parameters) == harmless, name
    assert not equals_transformers(replace(found, long_attention_factor=1.05), parameters)
