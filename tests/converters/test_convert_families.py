"""`convert_to_gguf` for qwen2, phi3 and granite: a real llama.cpp computes what transformers computes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import write_random_model

from longrope_export import RopeScaling
from longrope_export.checkpoint import open_checkpoint
from longrope_export.converters.doctor.examine import examine
from longrope_export.converters.export import export_model
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.rewrite import GgufChanges, rewrite_gguf
from longrope_export.converters.gguf.targets import TARGETS
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.errors import InputFileError, LossyTargetError, RuntimeFailure, UnsupportedModelError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.records import read_scaling
from longrope_export.pipeline import CONVERTIBLE
from longrope_export.runtimes import llamacpp

pytestmark = pytest.mark.usefixtures("quiet")
Record = Callable[..., RopeScaling]
BOUND = 1e-3  # nats, F32 against F32

OWN: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False},
    "phi3": {"partial_rotary_factor": 0.75, "pad_token_id": 0, "original_max_position_embeddings": 512, "resid_pdrop": 0.0},
    "granite": {
        "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0,
        "attention_bias": True, "tie_word_embeddings": True,
    },
}  # fmt: skip
ROTARY = {"qwen2": 32, "phi3": 24, "granite": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digit_tokenizer: Any, small_config: dict[str, Any]) -> Any:
    """Builder of a random model folder of a family, biases included, each built once."""
    made: dict[str, Path] = {}

    def build(family: str) -> Path:
        if family not in made:
            # phi3's own code takes the head's size from the width
            config = {**small_config, **OWN[family]}
            target = tmp_path_factory.mktemp("families") / family
            made[family] = write_random_model(target, family, config, digit_tokenizer)
        return made[family]

    return build


def distance(gguf: Path, folder: Path, length: int, context: int) -> float:
    """Largest difference of a next-token log-probability between llama.cpp and transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    prompt = [(7 * index * index + 3) % 590 + 2 for index in range(length)]
    ours = llamacpp.next_token_probabilities(gguf, [prompt], context=context)[0]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt]), use_cache=False).logits[0, -1]
    return float(np.abs(ours - logits.log_softmax(-1).numpy()).max())


@pytest.mark.parametrize(
    ("family", "with_factors", "plain"),
    [("qwen2", "llama", "qwen2"), ("phi3", "phi3", "phi3"), ("granite", "granite", "granite")],
)
def test_families_equal_transformers(
    folder: Any, record: Record, tmp_path: Path, family: str, with_factors: str, plain: str
) -> None:
    source, scaling = folder(family), record(ROTARY[family])
    convert_to_gguf(source, tmp_path / "plain.gguf", dtype="f32")
    assert read_gguf_header(tmp_path / "plain.gguf").get("general.architecture") == plain
    assert distance(tmp_path / "plain.gguf", source, 300, 512) < BOUND

    write_hf_folder(source, tmp_path / "hf", scaling)
    convert_to_gguf(source, tmp_path / "m.gguf", scaling, dtype="f32")
    assert read_gguf_header(tmp_path / "m.gguf").get("general.architecture") == with_factors
    assert read_scaling(tmp_path / "m.gguf") == scaling
    assert {found.severity for found in examine(tmp_path / "m.gguf")} == {"information"}
    assert distance(tmp_path / "m.gguf", tmp_path / "hf", 300, 512) < BOUND
    assert distance(tmp_path / "m.gguf", tmp_path / "hf", 700, 1024) < BOUND
    assert distance(tmp_path / "m.gguf", source, 300, 512) > 100 * BOUND


def test_extend_knows_what_can_be_converted() -> None:
    assert tuple(TARGETS) == CONVERTIBLE


def test_a_model_called_phi3_without_its_tokens_gets_another_name(folder: Any, tmp_path: Path) -> None:
    source = edited(folder("phi3"), tmp_path / "My-Phi-3-tune")
    convert_to_gguf(source, tmp_path / "m.gguf")
    header = read_gguf_header(tmp_path / "m.gguf")
    assert header.get("general.name") == "My-phi-tune"
    assert len(llamacpp.tokenize(tmp_path / "m.gguf", ["a b"])) == 1
    rewrite_gguf(header, tmp_path / "m.gguf", GgufChanges(entries={"general.name": "My-Phi-3-tune"}), overwrite=True)
    with pytest.raises(RuntimeFailure, match="vocabulary"):
        llamacpp.tokenize(tmp_path / "m.gguf", ["a b"])


def test_a_static_type_makes_qwen2_a_llama(folder: Any, tmp_path: Path) -> None:
    source = edited(
        folder("qwen2"), tmp_path / "hf", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    )
    convert_to_gguf(source, tmp_path / "m.gguf", dtype="f32")
    header = read_gguf_header(tmp_path / "m.gguf")
    assert header.get("general.architecture") == "llama"
    assert header.tensor("rope_freqs.weight") is not None
    assert distance(tmp_path / "m.gguf", source, 300, 512) < BOUND


def edited(source: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


@pytest.mark.parametrize(
    ("family", "changes", "error", "words"),
    [
        ("phi3", {"head_dim": 64, "partial_rotary_factor": 0.375}, UnsupportedModelError, "4 heads of 64 values are not the width"),
        ("phi3", {"sliding_window": 64}, LossyTargetError, "not to a sliding window of 64"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None},
         LossyTargetError, "not to a sliding window of 64"),
        ("granite", {"hidden_act": "gelu"}, UnsupportedModelError, "granite architecture has silu"),
        ("granite", {"logits_scaling": 0}, InputFileError, "logits_scaling"),
        ("granite", {"num_hidden_layers": 900}, InputFileError, "says 900 layers"),
    ],
)  # fmt: skip
def test_what_the_architectures_lack_is_refused(
    folder: Any, tmp_path: Path, family: str, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    source = edited(folder(family), tmp_path / "hf", **changes)
    with pytest.raises(error, match=words):
        convert_to_gguf(source, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("family", ["qwen2", "granite", "phi3"])
def test_back_to_a_folder(folder: Any, record: Record, tmp_path: Path, family: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, scaling = folder(family), record(ROTARY[family])
    convert_to_gguf(source, tmp_path / "m.gguf", scaling, dtype="f32")
    export_model(tmp_path / "m.gguf", tmp_path / "out", scaling, gguf=False)
    back = json.loads((tmp_path / "out" / "config.json").read_text())
    elsewhere = {"use_sliding_window", "partial_rotary_factor", "pad_token_id", "resid_pdrop"}
    wanted = {"model_type", *OWN[family], "hidden_size", "num_key_value_heads"} - elsewhere
    original = json.loads((source / "config.json").read_text())
    assert {key: back[key] for key in wanted} == pytest.approx({key: original[key] for key in wanted})
    assert read_scaling(tmp_path / "out") == scaling
    write_hf_folder(source, tmp_path / "hf", scaling)
    tokens = torch.tensor([[(7 * index * index + 3) % 590 + 2 for index in range(600)]])
    with torch.no_grad():
        left, right = (AutoModelForCausalLM.from_pretrained(tmp_path / name)(tokens).logits for name in ("hf", "out"))
    assert (left - right).abs().max() < 1e-4
    text = "def f(x):\n    return 123  # naïve"
    ours, theirs = (AutoTokenizer.from_pretrained(place)(text).input_ids for place in (tmp_path / "out", source))
    assert ours == theirs


@pytest.mark.parametrize(("family", "architecture"), [("qwen2", "llama"), ("granite", "granite")])
def test_the_loader_reads_what_transformers_drops(
    folder: Any, record: Record, tmp_path: Path, family: str, architecture: str
) -> None:
    convert_to_gguf(folder(family), tmp_path / "m.gguf", record(32), dtype="f32")
    path = tmp_path / "m.gguf"
    assert open_checkpoint(path).load(dtype="bfloat16").dtype.is_floating_point
    with pytest.raises(UnsupportedModelError, match="device_map"):
        open_checkpoint(path).load(device_map="auto")
    header = read_gguf_header(path)
    spoiled = tmp_path / "spoiled.gguf"
    for changes, error, words in (
        (GgufChanges(dropped=frozenset({"blk.1.attn_q.bias"})), InputFileError, "blk.1.attn_q.bias is missing"),
        (
            GgufChanges(vectors={"blk.0.attn_norm.weight": (1.0,) * 64}),
            InputFileError,
            r"of shape \(64,\), not \(128,\)",
        ),
        (GgufChanges(vectors={"blk.0.extra.weight": (1.0,)}), UnsupportedModelError, "has no place"),
        (GgufChanges(entries={f"{architecture}.block_count": 40}), InputFileError, "lacks layers"),
        (
            GgufChanges(removed=frozenset({f"{architecture}.feed_forward_length"})),
            InputFileError,
            "feed_forward_length",
        ),
        (GgufChanges(removed=frozenset({f"{architecture}.attention.layer_norm_rms_epsilon"})), InputFileError, "rms"),
    ):
        rewrite_gguf(header, spoiled, changes, overwrite=True)
        with pytest.raises(error, match=words):
            open_checkpoint(spoiled).load()
