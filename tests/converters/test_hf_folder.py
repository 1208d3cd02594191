"""`write_hf_folder`: real transformers loads the record's bits, for every family that is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling
from longrope_export.converters.hf_config import extended_config, longrope_parameters
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.errors import (
    InputFileError,
    LossyTargetError,
    OutputError,
    ScalingError,
    UnsupportedModelError,
)
from longrope_export.files import check_manifest
from longrope_export.formats.records import read_scaling
from longrope_export.formats.safetensors_header import read_safetensors_header
from longrope_export.rope.formulas import longrope_attention_factor

Record = Callable[..., RopeScaling]

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# family → (config class, model class, further values, rotary_dim, theta)
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int, float]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, 32, 1e4),
    "mistral": ("MistralConfig", "MistralForCausalLM", {}, 32, 1e4),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, 32, 1e6),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}, 16, 1e4),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {
        "partial_rotary_factor": 0.75, "original_max_position_embeddings": 32}, 24, 1e4),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {}, 32, 1e4),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {"head_dim": 32}, 32, 1e4),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        "head_dim": 32, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}, 32, 1e6),
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    built: dict[str, Path] = {}

    def build(family: str) -> Path:
        import torch
        import transformers

        if family not in built:
            config, model, more, _, _ = FAMILIES[family]
            torch.manual_seed(0)
            built[family] = tmp_path_factory.mktemp("family") / family
            made = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **more}))
            made.save_pretrained(built[family])
        return built[family]

    return build


def family_record(record: Record, family: str, **changes: Any) -> RopeScaling:
    _, _, _, rotary_dim, theta = FAMILIES[family]
    return record(
        rotary_dim,
        **{"rope_theta": theta, "original_max_position_embeddings": 32, "max_position_embeddings": 128, **changes},
    )


def expected_frequencies(scaling: RopeScaling, factors: tuple[float, ...]) -> Any:
    import torch

    exponents = torch.arange(0, scaling.rotary_dim, 2, dtype=torch.int64).float() / scaling.rotary_dim
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * scaling.rope_theta**exponents)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_applies_the_records_bits(
    folders: Callable[[str], Path], record: Record, tmp_path: Path, family: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    scaling = family_record(record, family)
    assert write_hf_folder(folders(family), tmp_path / "new", scaling) == []
    assert read_scaling(tmp_path / "new") == scaling
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    rotary, prefix = model.model.rotary_emb, "full_attention_" if family == "gemma3" else ""
    extra = ("full_attention",) if prefix else ()
    hidden = torch.zeros(1, 1, 8)
    for length, factors in ((32, scaling.short_factor), (33, scaling.long_factor)):
        cosine, _ = rotary(hidden, torch.arange(length)[None], *extra)
        frequencies = getattr(rotary, f"{prefix}inv_freq")
        assert torch.equal(frequencies, expected_frequencies(scaling, factors)), length
        assert cosine[0, 0, 0].item() == pytest.approx(scaling.long_attention_factor, abs=1e-7)
    assert model.config.max_position_embeddings == 128
    original = AutoModelForCausalLM.from_pretrained(folders(family))
    assert all(
        torch.equal(left, right)
        for left, right in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
    )


def test_sliding_layers_of_gemma3_keep_their_rope(
    folders: Callable[[str], Path], record: Record, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    write_hf_folder(folders("gemma3"), tmp_path / "new", family_record(record, "gemma3"))
    old, new = (
        AutoModelForCausalLM.from_pretrained(path).model.rotary_emb for path in (folders("gemma3"), tmp_path / "new")
    )
    assert torch.equal(old.sliding_attention_inv_freq, new.sliding_attention_inv_freq)


def test_config_has_every_reader_in_mind(folders: Callable[[str], Path], record: Record, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders("llama"), source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(
        json.dumps({**config, "use_cache": False, "original_max_position_embeddings": 8, "mine": [1]})
    )
    (source / "tokenizer_config.json").write_text('{"model_max_length": 32}')
    (source / "generation_config.json").write_text('{"use_cache": false}')
    scaling = family_record(record, "llama")
    write_hf_folder(source, tmp_path / "new", scaling, allow_lossy=True)
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["rope_parameters"] == written["rope_scaling"] == longrope_parameters(scaling)
    assert written["rope_parameters"]["rope_theta"] == written["rope_theta"] == 1e4
    assert written["rope_parameters"]["factor"] == 4.0
    assert written["rope_parameters"]["attention_factor"] == scaling.long_attention_factor
    assert "original_max_position_embeddings" not in written
    assert (written["max_position_embeddings"], written["head_dim"], written["use_cache"]) == (128, 32, True)
    assert written["mine"] == [1]
    assert RopeScaling.from_dict(written["longrope_export"]) == scaling
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["model_max_length"] == 128
    assert json.loads((tmp_path / "new" / "generation_config.json").read_text())["use_cache"] is True


def test_phi3_has_the_original_window_at_the_top_as_well(
    folders: Callable[[str], Path], record: Record, tmp_path: Path
) -> None:
    write_hf_folder(folders("phi3"), tmp_path / "new", family_record(record, "phi3"))
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert written["original_max_position_embeddings"] == 32
    assert written["rope_parameters"]["partial_rotary_factor"] == 0.75


def test_mscale_is_written_only_where_the_formula_would_be_wrong(record: Record) -> None:
    formula = longrope_attention_factor(4.0, 512)
    equal = record(long_attention_factor=formula, short_attention_factor=formula)
    assert not {"long_mscale", "short_mscale"} & set(longrope_parameters(equal))
    values = longrope_parameters(record(long_attention_factor=1.5, short_attention_factor=1.0))
    assert (values["long_mscale"], values["short_mscale"], values["attention_factor"]) == (1.5, 1.0, 1.5)


def test_multimodal_config_gets_the_factors_in_its_text_part(record: Record) -> None:
    text = {"model_type": "gemma3_text", "head_dim": 16, "max_position_embeddings": 512, "hidden_size": 64,
            "rope_theta": 1e6, "rope_local_base_freq": 20000.0}  # fmt: skip
    scaling = record(rope_theta=1e6)
    written = extended_config({"model_type": "gemma3", "text_config": text, "vision_config": {"a": 1}}, scaling)
    inner = written["text_config"]
    assert inner["rope_parameters"]["full_attention"] == inner["rope_scaling"] == longrope_parameters(scaling)
    assert inner["rope_parameters"]["sliding_attention"]["rope_theta"] == inner["rope_local_base_freq"] == 20000.0
    assert written["vision_config"] == {"a": 1}
    assert RopeScaling.from_dict(written["longrope_export"]) == scaling


def test_sharded_folder_side_files_and_manifest(folders: Callable[[str], Path], record: Record, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(folders("llama")).save_pretrained(source, max_shard_size="60KB")
    shards = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(shards) > 2
    (source / "tokenizer.model").write_bytes(b"\0\1")
    (source / "LICENSE").symlink_to(folders("llama") / "config.json")
    for name in (
        "pytorch_model.bin",
        "optimizer.pt",
        ".hidden",
        "model.gguf",
        "manifest.json",
        "pytorch_model.bin.index.json",
    ):
        (source / name).write_text("{}")
    scaling = family_record(record, "llama")
    write_hf_folder(source, tmp_path / "new", scaling)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    copied = {"tokenizer.model", "LICENSE", "generation_config.json", "model.safetensors.index.json"}
    assert names == {*shards, *copied, "config.json", "longrope.json", "manifest.json"}
    assert not (tmp_path / "new" / "LICENSE").is_symlink()
    assert set(check_manifest(tmp_path / "new")) == names - {"manifest.json"}
    for shard in shards:
        assert read_scaling(tmp_path / "new" / shard) == scaling
        before, after = (read_safetensors_header(folder / shard) for folder in (source, tmp_path / "new"))
        assert before.path.read_bytes()[before.data_start :] == after.path.read_bytes()[after.data_start :]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.rope_parameters["rope_type"] == "longrope"


def test_writing_twice_gives_equal_bytes_and_a_written_folder_can_be_written_again(
    folders: Callable[[str], Path], record: Record, tmp_path: Path
) -> None:
    first, second = family_record(record, "llama"), family_record(record, "llama", max_position_embeddings=256)
    write_hf_folder(folders("llama"), tmp_path / "a", first)
    write_hf_folder(folders("llama"), tmp_path / "b", second)
    write_hf_folder(tmp_path / "a", tmp_path / "ab", second)
    for file in (tmp_path / "b").iterdir():
        assert file.read_bytes() == (tmp_path / "ab" / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rope_theta": 5e5}, ScalingError, "rope_theta 500000, the model has 10000"),
        ({"original_max_position_embeddings": 64}, LossyTargetError, "a window of 64, the model has 32"),
        ({"long_start_tokens": 3}, LossyTargetError, "transformers will rescale the first 3 positions"),
        ({"short_attention_factor": 1.0}, LossyTargetError, "not 1"),
        ({"sets": {64: [1.0] * 16}}, LossyTargetError, "longrope_export.load only"),
    ],
)
def test_refused_records(
    folders: Callable[[str], Path], record: Record, tmp_path: Path, changes: Any, error: Any, message: str
) -> None:
    scaling = family_record(record, "llama", **changes)
    with pytest.raises(error, match=message):
        write_hf_folder(folders("llama"), tmp_path / "new", scaling)
    assert list(tmp_path.iterdir()) == []
    if error is LossyTargetError:
        assert len(write_hf_folder(folders("llama"), tmp_path / "new", scaling, allow_lossy=True)) == 1
        assert read_scaling(tmp_path / "new") == scaling


def test_wrong_number_of_factors_is_refused(folders: Callable[[str], Path], record: Record, tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match="has 16 factors, the model needs 12"):
        write_hf_folder(folders("phi3"), tmp_path / "new", family_record(record, "llama"))


def test_llama3_scaling_must_be_composed(folders: Callable[[str], Path], record: Record, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folders("llama"), source)
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(LossyTargetError, match="the model's own factors \\(llama3, up to 8\\)"):
        write_hf_folder(source, tmp_path / "new", family_record(record, "llama", short_factor=[1.0] * 16))
    composed = family_record(record, "llama", short_factor=[8.0] * 16, long_factor=[16.0] * 16)
    assert write_hf_folder(source, tmp_path / "new", composed) == []


def test_damaged_folders_are_refused(folders: Callable[[str], Path], record: Record, tmp_path: Path) -> None:
    scaling = family_record(record, "llama")
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(InputFileError, match=r"config.json does not exist"):
        write_hf_folder(source, tmp_path / "new", scaling)
    config = json.loads((folders("llama") / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputFileError, match=r"has no .safetensors weights"):
        write_hf_folder(source, tmp_path / "new", scaling)
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(UnsupportedModelError, match=r"pytorch_model.bin, which may run code"):
        write_hf_folder(source, tmp_path / "new", scaling)
    shutil.copy(folders("llama") / "model.safetensors", source / "model-1.safetensors")
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    with pytest.raises(InputFileError, match=r"model-2.safetensors is missing"):
        write_hf_folder(source, tmp_path / "new", scaling)
    (source / "model.safetensors.index.json").unlink()
    for name in ("tokenizer_config.json", "generation_config.json"):
        (source / name).write_bytes(b"\xff")
        with pytest.raises(InputFileError, match=rf"source/{name} is not valid JSON"):
            write_hf_folder(source, tmp_path / "new", scaling)
        (source / name).unlink()
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gptj"}))
    with pytest.raises(UnsupportedModelError, match="'gptj' is not known here"):
        write_hf_folder(source, tmp_path / "new", scaling)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_second_copy_of_the_weights_is_left_out(
    folders: Callable[[str], Path], record: Record, tmp_path: Path, sharded: bool
) -> None:
    """Mistral's folders hold `consolidated.safetensors` beside the files that transformers loads."""
    source, weights = tmp_path / "source", folders("llama") / "model.safetensors"
    source.mkdir()
    shutil.copy(folders("llama") / "config.json", source)
    shutil.copy(weights, source / "consolidated.safetensors")
    name = "model-00001-of-00001.safetensors" if sharded else "model.safetensors"
    shutil.copy(weights, source / name)
    if sharded:
        index = {"weight_map": dict.fromkeys(read_safetensors_header(weights).tensors, name)}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    write_hf_folder(source, tmp_path / "new", family_record(record, "llama"))
    assert [path.name for path in (tmp_path / "new").glob("*.safetensors")] == [name]


def test_an_existing_folder_and_a_failing_writer_leave_nothing(
    folders: Callable[[str], Path], record: Record, tmp_path: Path
) -> None:
    scaling = family_record(record, "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    with pytest.raises(OutputError, match="not an empty folder"):
        write_hf_folder(folders("llama"), tmp_path / "full", scaling)

    def fail(folder: Path) -> None:
        assert (folder / "config.json").exists()
        raise np.exceptions.TooHardError("stop")

    with pytest.raises(np.exceptions.TooHardError):
        write_hf_folder(folders("llama"), tmp_path / "new", scaling, add=fail)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
