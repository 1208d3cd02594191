"""An adapter's folder: complete, with its factors and its base, and refused for any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trained_models import RECORD, logits, tiny, trained_for

from longrope_export.errors import InputFileError, LongRopeError, StaleStateError
from longrope_export.formats.records import read_scaling
from longrope_export.loader import load
from longrope_export.scaling import RopeScaling
from longrope_export.training.adapter import load_adapter, save_adapter, saved_name
from longrope_export.training.parameters import LoraOptions, is_tied, make_trainable, merge, trained_weights


def base_folder(folder: Path, seed: int = 0) -> Path:
    model = tiny(tie_word_embeddings=True)
    torch.manual_seed(seed)
    with torch.no_grad():
        model.model.norm.weight.add_(torch.rand(48) * seed)
    # The plain model: the factors came from a file of their own.
    for name in ("longrope_export", "rope_parameters"):
        model.config.__dict__.pop(name, None)
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    model.config.max_position_embeddings = 8
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A trained LoRA with embeddings and norms on a tied model, in memory and as a folder."""
    model = make_trainable(load(base, RECORD, switch="long"), "lora-plus", LoraOptions(rank=3, alpha=7.0))
    trained_for(model)
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(model, folder, RECORD, base)
    return model, folder


@pytest.fixture
def copy(trained: tuple[Any, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[1], tmp_path / "adapter"))


def test_the_folder_holds_every_trained_weight_and_the_factors(trained: tuple[Any, Path]) -> None:
    model, folder = trained
    saved = load_file(folder / "adapter_model.safetensors")
    weights = trained_weights(model)
    # PEFT's own loading asks for the tied lm_head too.
    assert set(saved) == {*(saved_name(name) for name in weights), "base_model.model.lm_head.weight"}
    assert all(torch.equal(saved[saved_name(name)], weight) for name, weight in weights.items())
    record = read_scaling(folder)
    assert record.long_factor == RECORD.long_factor
    assert record.provenance["adapter_base"]["name"] == "model"
    assert not list(folder.glob("*.bin"))


def test_loaded_again_it_gives_the_same_logits_with_the_factors(trained: tuple[Any, Path], base: Path) -> None:
    model, folder = trained
    again = load_adapter(base, folder, switch="long")
    torch.testing.assert_close(logits(again), logits(model.eval()), rtol=1e-5, atol=1e-5)
    assert (logits(load_adapter(base, folder, switch="short")) - logits(again)).abs().max() > 1e-2
    plain = merge(again)
    assert is_tied(plain)
    assert plain.config.rope_parameters["long_factor"] == list(RECORD.long_factor)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_itself_can_read_the_folder(trained: tuple[Any, Path], base: Path) -> None:
    from peft import PeftModel

    model, folder = trained
    again = PeftModel.from_pretrained(load(base, RECORD, switch="long"), folder)
    torch.testing.assert_close(logits(again), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_a_trained_weight_that_would_be_lost_is_noticed(base: Path, tmp_path: Path) -> None:
    model = make_trainable(tiny(), "lora")
    model.get_base_model().model.norm.weight.requires_grad_(True)  # LongLoRA's own script does it so
    with pytest.raises(LongRopeError, match=r"model\.norm\.weight would not be in the adapter"):
        save_adapter(model, tmp_path, RECORD, base)
    assert not list(tmp_path.iterdir())


def test_another_base_is_refused_by_name(trained: tuple[Any, Path], tmp_path: Path) -> None:
    other = base_folder(tmp_path / "other", seed=1)
    with pytest.raises(StaleStateError, match=r"another model \('model'\) than .*other"):
        load_adapter(other, trained[1])


def test_other_factors_are_refused(trained: tuple[Any, Path], base: Path) -> None:
    changed = RopeScaling.from_dict({**RECORD.to_dict(), "long_factor": [1.0, 1.5, 2.0, 3.0]})
    with pytest.raises(StaleStateError, match="with other factors"):
        load_adapter(base, trained[1], changed)


def test_an_exchanged_record_is_noticed(copy: Path, base: Path) -> None:
    values = json.loads((copy / "longrope.json").read_text())
    (copy / "longrope.json").write_text(json.dumps({**values, "long_factor": [1.0, 1.5, 2.0, 3.0]}))
    with pytest.raises(InputFileError, match=r"adapter_model\.safetensors"):
        load_adapter(base, copy)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "longrope.json"])
def test_a_missing_file_is_named_and_a_pickle_is_no_substitute(copy: Path, base: Path, name: str) -> None:
    (copy / name).rename(copy / "adapter_model.bin")
    with pytest.raises(InputFileError, match=f"has no {name}"):
        load_adapter(base, copy)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("r", 2**40, "r is 1099511627776, but the weights have rank 3"),
        ("r", True, "r is True"),
        ("lora_alpha", "7", "lora_alpha is '7'"),
        ("lora_alpha", 0, "lora_alpha is 0"),
        ("peft_type", "IA3", "peft_type is 'IA3'"),
        ("use_rslora", True, "use_rslora is True"),
        ("target_modules", ".*(a+)+", "target_modules must be a list"),
        ("target_modules", ["q_proj"], "does not fit the model"),
        ("modules_to_save", ["norm"], "does not fit the model"),
    ],
)  # fmt: skip
def test_an_odd_config_is_refused(copy: Path, base: Path, key: str, value: Any, message: str) -> None:
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputFileError, match=message.replace("(", r"\(").replace("*", r"\*").replace("+", r"\+")):
        load_adapter(base, copy)


def test_alpha_counts(copy: Path, base: Path, trained: tuple[Any, Path]) -> None:
    path = copy / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 70}))
    changed = logits(load_adapter(base, copy, switch="long"))
    assert (changed - logits(trained[0].eval())).abs().max() > 1e-2


def test_weights_of_another_shape_are_refused(copy: Path, base: Path) -> None:
    path = copy / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] = torch.zeros(48, 4)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputFileError, match=f"1 weights differ, the first is {name[:20]}"):
        load_adapter(base, copy)


def test_a_record_without_a_base_is_refused(copy: Path, base: Path) -> None:
    (copy / "longrope.json").write_text(RECORD.to_json())
    save_file(load_file(copy / "adapter_model.safetensors"), copy / "adapter_model.safetensors")
    with pytest.raises(InputFileError, match="does not say which model"):
        load_adapter(base, copy)
