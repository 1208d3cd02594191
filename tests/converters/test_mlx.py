"""What mlx-lm, run on the CPU, computes with our model folders: the long factors, with the attention factor of the formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling, load
from longrope_export.converters.doctor.examine import examine
from longrope_export.converters.doctor.repair import repair
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.converters.hf_profiles import DEFAULT, default_misreaders
from longrope_export.families import FAMILIES
from longrope_export.rope.formulas import longrope_attention_factor

pytestmark = pytest.mark.usefixtures("quiet")
Record = Callable[..., RopeScaling]
FORMULA = longrope_attention_factor(4.0, 512)
SAME, OTHER = 1e-3, 0.03  # nats
TOKENS = [(7 * index * index + 3) % 590 + 2 for index in range(600)]

mlx_lm_utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is for Linux and macOS")


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, small_llama: Path, small_config: dict[str, Any]
) -> dict[str, Path]:
    """A random llama, a qwen2 with biases, and a phi3 that rotates a part of each head."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {"llama": small_llama}
    for family, more in {
        "qwen2": {},
        "phi3": {"partial_rotary_factor": 0.75, "pad_token_id": 0, "original_max_position_embeddings": 512, "resid_pdrop": 0.0},
    }.items():  # fmt: skip
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**small_config, **more}))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        made[family] = tmp_path_factory.mktemp("mlx") / family
        model.save_pretrained(made[family])
    return made


def in_mlx(folder: Path, length: int = 600) -> Any:
    """Log-probabilities [length, vocabulary] by mlx-lm's own loader and model."""
    import mlx.core as mx

    model, _ = mlx_lm_utils.load_model(folder)
    logits = np.array(model(mx.array(TOKENS[:length])[None])[0].astype(mx.float32), dtype=np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def in_reference(source: Path, scaling: RopeScaling, switch: Any = "long", length: int = 600) -> Any:
    import torch

    model = load(source, scaling, switch=switch)
    with torch.no_grad():
        return model(torch.tensor([TOKENS[:length]]), use_cache=False).logits[0].double().log_softmax(-1).numpy()


def distance(left: Any, right: Any) -> float:
    return float(np.abs(left - right).max())


def formula(record: Record, rotary_dim: int = 32) -> RopeScaling:
    return record(rotary_dim, long_attention_factor=FORMULA, short_attention_factor=FORMULA)


@pytest.mark.parametrize(("family", "profile"), [("llama", DEFAULT), ("qwen2", DEFAULT), ("phi3", "mlx-phi3")])
def test_mlx_applies_the_long_factors_at_every_length(
    sources: dict[str, Path], record: Record, tmp_path: Path, family: str, profile: str
) -> None:
    source, scaling = sources[family], formula(record, 24 if family == "phi3" else 32)
    write_hf_folder(source, tmp_path / "out", scaling, profile=profile, allow_lossy=profile != DEFAULT)
    assert distance(in_mlx(tmp_path / "out"), in_reference(source, scaling)) < SAME
    short = in_mlx(tmp_path / "out", 300)
    assert distance(short, in_reference(source, scaling, "long", 300)) < SAME
    assert distance(short, in_reference(source, scaling, "short", 300)) > OTHER
    assert "mlx-lm uses the long factors at every length" in default_misreaders(FAMILIES[family], scaling)


def test_mlx_takes_the_formula_s_attention_factor(sources: dict[str, Path], record: Record, tmp_path: Path) -> None:
    """What the default profile's notes and the doctor's H10 say."""
    write_hf_folder(sources["llama"], tmp_path / "out", record(32))
    found = in_mlx(tmp_path / "out")
    assert distance(found, in_reference(sources["llama"], formula(record))) < SAME
    assert distance(found, in_reference(sources["llama"], record(32))) > OTHER
    notes = " ".join(default_misreaders(FAMILIES["llama"], record(32)))
    assert f"mlx-lm and ExLlama ignore the attention factor 1.1 and take {FORMULA:.6g}" in notes


def test_mlx_refuses_a_phi3_of_the_default_profile(sources: dict[str, Path], record: Record, tmp_path: Path) -> None:
    write_hf_folder(sources["phi3"], tmp_path / "out", formula(record, 24))
    with pytest.raises(ValueError, match="must contain keys"):
        in_mlx(tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("H07", lambda config: config.pop("rope_scaling")),
        ("H09", lambda config: [config[key].update(factor=8.0) for key in ("rope_scaling", "rope_parameters")]),
        ("H08", lambda config: config.update(max_position_embeddings=512)),
    ],
)
def test_the_doctor_mends_what_mlx_reads_wrongly(
    sources: dict[str, Path], record: Record, tmp_path: Path, name: str, spoil: Callable[[Any], Any]
) -> None:
    scaling, folder = formula(record), tmp_path / "out"
    write_hf_folder(sources["llama"], folder, scaling)
    config = json.loads((folder / "config.json").read_text())
    del config["longrope_export"]
    if name == "H09":  # transformers then takes the factor's value, and mlx-lm the windows'
        for key in ("rope_scaling", "rope_parameters"):
            del config[key]["attention_factor"]
    spoil(config)
    (folder / "config.json").write_text(json.dumps(config))
    assert name in {found.rule.name for found in examine(folder)}
    right = in_reference(sources["llama"], scaling)
    wrong = distance(in_mlx(folder), right)
    assert (wrong < SAME) == (name == "H09")
    repair(folder, None if name != "H09" else scaling)
    assert name not in {found.rule.name for found in examine(folder)}
    assert distance(in_mlx(folder), right) < SAME
