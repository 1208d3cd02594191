"""Exports for families whose own GGUF architecture ignores factors: a real llama.cpp computes what transformers does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from random_models import write_random_model

from longrope_export import RopeScaling
from longrope_export.checkpoint import open_checkpoint
from longrope_export.cli.main import cli
from longrope_export.converters.doctor.examine import examine
from longrope_export.converters.gguf.approximate import APPROXIMATED_KEY, approximation
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.disguise import disguised
from longrope_export.converters.gguf.embed import embed
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.converters.gguf.rewrite import GgufChanges, rewrite_gguf
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.converters.lossy import one_set_record
from longrope_export.errors import InputFileError, LossyTargetError, UnsupportedModelError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_scaling import FOLDED_KEY
from longrope_export.formats.gguf_tensors import read_raw
from longrope_export.formats.records import read_scaling
from longrope_export.runtimes import llamacpp

pytestmark = pytest.mark.usefixtures("quiet")
Record = Callable[..., RopeScaling]
BOUND = 1e-3  # nats, F32 against F32
SCALE = "granite.attention.scale"


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, digit_tokenizer: Any, small_config: dict[str, Any], small_llama: Path
) -> Any:
    """Builder of a random model folder of a family, biases included, each built once."""
    made: dict[str, Path] = {"llama": small_llama}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}

    def build(family: str, **changes: Any) -> Path:
        name = f"{family}{len(changes)}"
        if not changes and family in made:
            return made[family]
        target = tmp_path_factory.mktemp("stand-ins") / name
        made[family] = write_random_model(target, family, {**small_config, **rope, **changes}, digit_tokenizer)
        return made.pop(family) if changes else made[family]

    return build


def prompt(length: int) -> list[int]:
    return [(7 * index * index + 3) % 590 + 2 for index in range(length)]


def expected(folder: Path, length: int, **rope: Any) -> Any:
    """transformers' log-probabilities after the prompt; `rope` replaces entries of the config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, **rope)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)
        logits = model(torch.tensor([prompt(length)]), use_cache=False).logits[0, -1]
    return logits.log_softmax(-1).numpy()


def computed(gguf: Path, length: int, context: int) -> Any:
    return llamacpp.next_token_probabilities(gguf, [prompt(length)], context=context)[0]


def distance(left: Any, right: Any) -> float:
    return float(np.abs(left - right).max())


STAND_INS = [("qwen2", "phi3"), ("qwen2", "granite"), ("qwen3", "step35"), ("llama", "phi3")]


@pytest.mark.parametrize(
    ("family", "architecture"),
    [*STAND_INS[1:3], *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (STAND_INS[0], STAND_INS[3]))],
)
def test_stand_ins_equal_transformers(
    folder: Any, record: Record, tmp_path: Path, family: str, architecture: str
) -> None:
    source, scaling, path = folder(family), record(32), tmp_path / "m.gguf"
    convert_to_gguf(source, path, scaling, dtype="f32", architecture=architecture)
    header = read_gguf_header(path)
    assert header.get("general.architecture") == architecture
    assert read_scaling(path) == scaling
    assert {found.severity for found in examine(path)} == {"information"}
    write_hf_folder(source, tmp_path / "hf", scaling)
    ours = computed(path, 700, 1024)
    assert distance(ours, expected(tmp_path / "hf", 700)) < BOUND
    assert distance(ours, expected(source, 700)) > 100 * BOUND  # what dropped factors give


@pytest.mark.slow
@pytest.mark.parametrize(("family", "architecture"), [*STAND_INS, ("llama", "granite"), ("mistral", "phi3")])
def test_stand_ins_use_the_short_factors_in_short_contexts(
    folder: Any, record: Record, tmp_path: Path, family: str, architecture: str
) -> None:
    source, path = folder(family, sliding_window=None) if family == "mistral" else folder(family), tmp_path / "m.gguf"
    convert_to_gguf(source, path, record(32), dtype="f32", architecture=architecture)
    write_hf_folder(source, tmp_path / "hf", record(32))
    wanted = expected(tmp_path / "hf", 300)
    assert distance(computed(path, 300, 512), wanted) < BOUND
    assert distance(computed(path, 300, 1024), wanted) > 100 * BOUND
    ones = GgufChanges(vectors={"rope_factors_short.weight": (1.0,) * 16})
    rewrite_gguf(read_gguf_header(path), tmp_path / "dropped.gguf", ones)
    assert distance(computed(tmp_path / "dropped.gguf", 300, 512), wanted) > 100 * BOUND


def test_one_set_for_older_builds(folder: Any, record: Record, tmp_path: Path) -> None:
    source, scaling, path = folder("qwen2"), record(32), tmp_path / "m.gguf"
    with pytest.raises(LossyTargetError, match="use the long factors in short contexts as well"):
        convert_to_gguf(source, path, scaling, static=True)
    losses = convert_to_gguf(source, path, scaling, dtype="f32", static=True, allow_lossy=True)
    assert losses == ["llama.cpp will use the long factors in short contexts as well: one set for every length"]
    header = read_gguf_header(path)
    assert (header.get("general.architecture"), header.get("llama.rope.scaling.type")) == ("llama", None)
    assert read_scaling(path) == one_set_record(scaling)
    assert {found.severity for found in examine(path)} <= {"information"}
    longs = {"long_factor": scaling.long_factor, "short_factor": scaling.long_factor}
    write_hf_folder(source, tmp_path / "hf", replace(scaling, **longs))
    ours = computed(path, 300, 512)
    assert distance(ours, expected(tmp_path / "hf", 300)) < BOUND
    assert distance(ours, expected(source, 300)) > 100 * BOUND

    # the same from a GGUF file, and back to two sets
    convert_to_gguf(source, tmp_path / "plain.gguf", dtype="f32")
    embed(tmp_path / "plain.gguf", tmp_path / "e.gguf", scaling, static=True, allow_lossy=True)
    assert contents(tmp_path / "e.gguf") == contents(path)
    patch_gguf(path, tmp_path / "again.gguf", scaling)
    convert_to_gguf(source, tmp_path / "two.gguf", scaling, dtype="f32")
    assert contents(tmp_path / "again.gguf") == contents(tmp_path / "two.gguf")
    with pytest.raises(UnsupportedModelError, match="phi3 architecture has no place for one set"):
        convert_to_gguf(source, tmp_path / "no.gguf", scaling, static=True, allow_lossy=True, architecture="phi3")


def contents(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Keys that programs read, and every tensor's bytes."""
    header = read_gguf_header(path)
    skipped = ("general.name", "llama.rope.dimension_count")
    keys = {key: header.get(key) for key in header.metadata if key not in skipped}
    return keys, {info.name: read_raw(header, info.name) for info in header.tensors}


@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_a_quantised_qwen2_is_rewritten_byte_exactly(
    folder: Any, record: Record, tmp_path: Path, architecture: str
) -> None:
    """Rows move as whole blocks: the same as quantising the permuted weights, whose result the tests above run."""
    convert_to_gguf(folder("qwen2"), tmp_path / "plain.gguf", dtype="q8_0")
    path, plan = embed(tmp_path / "plain.gguf", tmp_path / "m.gguf", record(32), architecture=architecture)
    convert_to_gguf(folder("qwen2"), tmp_path / "direct.gguf", record(32), dtype="q8_0", architecture=architecture)
    assert contents(path) == contents(tmp_path / "direct.gguf")
    assert read_scaling(path) == record(32)
    assert any("LoRA adapters made for qwen2" in note for note in plan.notes)
    before, after = contents(tmp_path / "plain.gguf")[1], contents(path)[1]
    assert {name for name in before if before[name] != after[name]} == {
        f"blk.{layer}.attn_{kind}.{what}" for layer in (0, 1) for kind in "qk" for what in ("weight", "bias")
    }


def test_granite_holds_the_attention_factor_where_no_shift_doubles_it(
    folder: Any, record: Record, tmp_path: Path
) -> None:
    path = tmp_path / "m.gguf"
    convert_to_gguf(folder("llama"), tmp_path / "llama.gguf", record(32), dtype="f32")
    _, plan = embed(tmp_path / "llama.gguf", path, record(32), architecture="granite")
    header = read_gguf_header(path)
    assert "granite.rope.scaling.attn_factor" not in header.metadata
    assert header.get(SCALE) == pytest.approx(1.1**2 / 32**0.5, rel=1e-6)
    assert any("a context shift stays exact" in note for note in plan.notes)
    assert not any("keep context shift off" in note for note in plan.notes)
    other = record(32, long_attention_factor=1.3, short_attention_factor=1.3)
    patch_gguf(path, tmp_path / "other.gguf", other)
    embed(tmp_path / "llama.gguf", tmp_path / "direct.gguf", other, architecture="granite")
    assert contents(tmp_path / "other.gguf") == contents(tmp_path / "direct.gguf")
    model = open_checkpoint(path).load()
    assert (type(model).__name__, model.config.model_type) == ("LlamaForCausalLM", "llama")
    for changes in (GgufChanges(entries={SCALE: 0.2}), GgufChanges(removed=frozenset({SCALE})),
                    GgufChanges(entries={FOLDED_KEY: "1.1"})):  # fmt: skip
        rewrite_gguf(header, tmp_path / "spoiled.gguf", changes, overwrite=True)
        with pytest.raises(InputFileError, match="does not hold the attention factor"):
            read_scaling(tmp_path / "spoiled.gguf")


def test_the_loader_reads_a_qwen2_in_granite_s_place(folder: Any, record: Record, tmp_path: Path) -> None:
    import torch

    convert_to_gguf(folder("qwen2"), tmp_path / "m.gguf", record(32), dtype="f32", architecture="granite")
    model = open_checkpoint(tmp_path / "m.gguf").load()
    assert type(model).__name__ == "Qwen2ForCausalLM"
    with torch.no_grad():
        logits = model(torch.tensor([prompt(300)])).logits[0, -1].log_softmax(-1).numpy()
    assert distance(logits, expected(folder("qwen2"), 300)) < BOUND
    convert_to_gguf(folder("qwen2"), tmp_path / "phi.gguf", record(32), dtype="f32", architecture="phi3")
    with pytest.raises(UnsupportedModelError, match=r"attn_qkv.bias' has no place"):
        open_checkpoint(tmp_path / "phi.gguf").load()


def test_what_cannot_stand_for_a_model_is_refused(folder: Any, record: Record, tmp_path: Path) -> None:
    path, scaling = tmp_path / "m.gguf", record(32)
    for family, architecture, words in (
        ("llama", "step35", "llama cannot be written as step35, only as llama or phi3 or granite"),
        ("qwen3", None, "it can be written as step35"),
        ("qwen3", "llama", "only as step35"),
    ):
        with pytest.raises(UnsupportedModelError, match=words):
            convert_to_gguf(folder(family), path, scaling, architecture=architecture)
    with pytest.raises(UnsupportedModelError, match="give a record"):
        convert_to_gguf(folder("qwen2"), path, architecture="granite")
    biased = folder("llama", attention_bias=True)
    with pytest.raises(UnsupportedModelError, match=r"attn_output.bias' has no place in llama.cpp's phi3"):
        convert_to_gguf(biased, path, scaling, architecture="phi3")
    assert not path.exists()
    convert_to_gguf(folder("qwen2"), tmp_path / "plain.gguf")
    header = read_gguf_header(tmp_path / "plain.gguf")
    with pytest.raises(UnsupportedModelError, match="a GGUF of architecture qwen2 cannot be written as phi3"):
        disguised(header, "phi3")
    for changes, error, words in (
        (GgufChanges(entries={"qwen2.attention.head_count": 3}), InputFileError, "are no 3 heads"),
        (GgufChanges(entries={"llama.context_length": 3}), InputFileError, "keys of qwen2 and of llama"),
        (GgufChanges(vectors={"blk.0.attn_qkv.weight": (1.0,)}), UnsupportedModelError, "without --fuse-qkv"),
    ):
        rewrite_gguf(header, tmp_path / "wrong.gguf", changes, overwrite=True)
        with pytest.raises(error, match=words):
            embed(tmp_path / "wrong.gguf", path, scaling)
    assert not path.exists()


def test_a_tied_qwen3_gets_an_output_and_a_phantom_layer(folder: Any, record: Record, tmp_path: Path) -> None:
    convert_to_gguf(folder("qwen3", tie_word_embeddings=True), tmp_path / "m.gguf", record(32), architecture="step35")
    header = read_gguf_header(tmp_path / "m.gguf")
    assert read_raw(header, "output.weight") == read_raw(header, "token_embd.weight")
    keys = ("block_count", "nextn_predict_layers", "rope.dimension_count")
    assert [header.get(f"step35.{key}") for key in keys] == [3, 1, 64]
    assert list(header.read_array("step35.attention.sliding_window_pattern")) == [False, False, True]


@pytest.mark.parametrize(
    "method", ["yarn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("linear", "base"))]
)
def test_approximations_are_what_their_keys_say(folder: Any, record: Record, tmp_path: Path, method: str) -> None:
    """qwen2 has no factor tensor: llama.cpp with the keys equals transformers with that rope type, not with ours."""
    source, scaling, plain, path = folder("qwen2"), record(32), tmp_path / "plain.gguf", tmp_path / "m.gguf"
    convert_to_gguf(source, plain, dtype="f32")
    _, plan = embed(plain, path, scaling, approximate=method, allow_lossy=True)
    assert method in plan.losses[0]
    header, found = read_gguf_header(path), approximation(method, scaling)
    assert header.get("general.architecture") == "qwen2"
    assert header.get(APPROXIMATED_KEY) == scaling.to_json()
    with pytest.raises(InputFileError, match="no longrope scaling"):
        read_scaling(path)
    # as longrope with one set: transformers' linear type has no attention factor
    applied = tuple(found.divisors.tolist())
    same = record(32, long_factor=applied, short_factor=applied)
    write_hf_folder(source, tmp_path / "hf", same)
    write_hf_folder(source, tmp_path / "exact", scaling)
    ours = computed(path, 700, 1024)
    assert distance(ours, expected(tmp_path / "hf", 700)) < BOUND
    assert distance(ours, expected(source, 700)) > 100 * BOUND
    assert distance(ours, expected(tmp_path / "exact", 700)) > 100 * BOUND


def test_the_nearest_approximation_is_found_and_its_loss_is_told(record: Record) -> None:
    pairs = np.arange(16)
    base = record(32, long_factor=(5.0 ** (pairs * 2 / 32)).tolist())
    found = approximation("auto", base)
    assert found.method == "base"
    assert found.keys["rope.freq_base"] == pytest.approx(5e4)
    assert found.error(base).max() < 1e-6
    linear = record(32, long_factor=[3.0] * 16)
    assert approximation("auto", linear).keys["rope.scaling.factor"] == pytest.approx(3.0)
    yarn = approximation("yarn", record(32))
    assert approximation("auto", record(32, long_factor=yarn.divisors.tolist())).method == "yarn"


def test_approximating_from_the_command_line(folder: Any, record: Record, tmp_path: Path) -> None:
    (tmp_path / "longrope.json").write_text(record(32).to_json())
    plain, path = tmp_path / "plain.gguf", tmp_path / "m.gguf"
    convert_to_gguf(folder("qwen2"), plain)

    def run(*arguments: object) -> Any:
        options = ["--scaling", tmp_path / "longrope.json", "--out", path]
        return CliRunner().invoke(cli, ["convert", *map(str, [*arguments, *options])])

    refused = run(plain, "--approximate", "auto")
    assert isinstance(refused.exception, LossyTargetError)
    assert "off by 27.9% on average and by 48.9% at most (pair 15)" in str(refused.exception)
    done = run(plain, "--approximate", "auto", "--allow-lossy", "--json")
    assert done.exit_code == 0, done.output
    assert "will scale by base" in json.loads(done.stdout)["lossy"][0]
    assert read_gguf_header(path).get("qwen2.rope.freq_base") == pytest.approx(140540.4, rel=1e-5)
    assert run(folder("qwen2"), "--approximate", "auto").exit_code == 2
    assert run(plain, "--approximate", "auto", "--as", "llama").exit_code == 2
    again = run(plain, "--as", "granite", "--overwrite")
    assert again.exit_code == 0
    assert "note: the file is a granite for programs" in again.output
    one = run(folder("qwen2"), "--static", "--allow-lossy", "--dtype", "q8_0", "--overwrite")
    assert "2024-07" in one.output
    assert read_gguf_header(path).tensor("rope_freqs.weight") is not None
    assert read_gguf_header(path).get("general.file_type") == 7
    as_phi3 = run(folder("qwen2"), "--as", "phi3", "--overwrite")
    assert "2024-05" in as_phi3.output
    assert read_gguf_header(path).get("general.architecture") == "phi3"
