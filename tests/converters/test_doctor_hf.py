"""`longrope doctor` on model folders: each misconfiguration is found in a config made wrong on purpose, and mended."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling
from longrope_export.converters.doctor.examine import examine
from longrope_export.converters.doctor.findings import ERROR, INFORMATION, WARNING, Finding
from longrope_export.converters.doctor.hf_rules import HF_RULES
from longrope_export.converters.doctor.repair import repair
from longrope_export.converters.export import export_model
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.converters.hf_config import extended_config, json_text
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.demo import demo_model_path
from longrope_export.description import describe
from longrope_export.errors import InputFileError, ScalingError
from longrope_export.files import check_manifest
from longrope_export.formats.records import read_scaling

Record = Callable[..., RopeScaling]
Config = dict[str, Any]
OURS = "longrope_export"

SIZES: Config = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512, "rope_theta": 10000.0}


def both(config: Config) -> list[Config]:
    return [config["rope_parameters"], config["rope_scaling"]]


def everywhere(config: Config, **values: Any) -> None:
    for place in both(config):
        place.update(values)


def without(config: Config, *keys: str) -> None:
    for place in both(config):
        for key in keys:
            place.pop(key, None)


def names(path: Path, *severities: str) -> set[str]:
    return {found.rule.name for found in examine(path) if found.severity in (severities or (ERROR, WARNING))}


def only(path: Path, name: str) -> Finding:
    return next(found for found in examine(path) if found.rule.name == name)


@pytest.fixture
def write(tmp_path: Path, record: Record) -> Callable[..., Path]:
    """Writer of an extended config.json of 8 pairs, without our record (or with it), after `spoil` changed it."""

    def build(spoil: Callable[[Config], Any] = lambda config: None, *, model_type: str = "llama", ours: bool = False,
              scaling: RopeScaling | None = None) -> Path:  # fmt: skip
        config = extended_config({"model_type": model_type, **SIZES}, scaling or record())
        if not ours:
            del config[OURS]
        spoil(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / "config.json"

    return build


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "phi3", "granite", "gemma2"])
def test_our_own_folders_are_clean(write: Callable[..., Path], record: Record, model_type: str) -> None:
    dimension = {"qwen3": 128, "gemma2": 256}.get(model_type, 16)
    scaling = record(dimension)
    assert names(write(model_type=model_type, ours=True, scaling=scaling)) == set()
    assert names(write(model_type=model_type, scaling=scaling)) == set()


def test_our_own_nested_config_and_a_plain_one_are_clean(tmp_path: Path, record: Record) -> None:
    scaling = record(256, rope_theta=1e6)
    config = extended_config({"model_type": "gemma3_text", "max_position_embeddings": 512}, scaling)
    (tmp_path / "config.json").write_text(json_text(config))
    assert names(tmp_path) == set()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    assert examine(tmp_path) == []


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": 1.5},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 512},
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_other_scalings_are_clean(tmp_path: Path, rope: dict[str, Any], key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES, key: rope}))
    assert names(tmp_path) == set()


def test_our_own_export_of_the_demo_model_is_clean(tmp_path: Path, record: Record) -> None:
    theta = describe(demo_model_path()).rope_theta
    scaling = record(64, rope_theta=theta, original_max_position_embeddings=256, max_position_embeddings=1024)
    export_model(demo_model_path(), tmp_path / "out", scaling)
    found = examine(tmp_path / "out")
    assert {Path(entry.path).suffix for entry in found} == {".json", ".gguf"}
    assert {entry.severity for entry in found} == {INFORMATION}
    patch_gguf(next((tmp_path / "out").glob("*.gguf")), tmp_path / "patched.gguf", scaling)
    assert names(tmp_path / "patched.gguf") == set()


def test_every_rule_has_the_name_it_is_found_under() -> None:
    assert [f"H{number:02}" for number in range(1, 25)] == list(HF_RULES)
    assert all(rule.name == name and rule.condition and rule.symptom for name, rule in HF_RULES.items())


# what breaks the config, the finding, and whether --fix alone, or a record, mends it
BROKEN: list[tuple[str, Callable[[Config], Any], str, bool]] = [
    ("H01", lambda config: everywhere(config, long_factor=[1.0] * 7), ERROR, False),
    ("H01", lambda config: everywhere(config, short_factor="1"), ERROR, False),
    ("H02", lambda config: without(config, "short_factor"), ERROR, False),
    ("H02", lambda config: without(config, "long_factor"), ERROR, False),
    ("H03", lambda config: without(config, "original_max_position_embeddings"), ERROR, False),
    ("H05", lambda config: everywhere(config, type="longrope"), WARNING, True),
    ("H06", lambda config: [place.update(type="su") or place.pop("rope_type") for place in both(config)], WARNING, True),
    ("H07", lambda config: config.pop("rope_scaling"), WARNING, True),
    ("H08", lambda config: config.update(max_position_embeddings=512), WARNING, True),
    ("H08", lambda config: config.update(max_position_embeddings=256), WARNING, False),
    ("H09", lambda config: everywhere(config, factor=8.0), WARNING, True),
    ("H10", lambda config: without(config, "short_mscale", "long_mscale"), WARNING, True),
    ("H11", lambda config: without(config, "attention_factor"), WARNING, True),
    ("H11", lambda config: everywhere(config, long_mscale=1.4), WARNING, False),
    ("H21", lambda config: everywhere(config, long_factor=[0.0] * 8), ERROR, False),
    ("H21", lambda config: everywhere(config, long_factor=[1 / (1 + index) for index in range(8)]), WARNING, False),
    ("H22", lambda config: config["rope_scaling"].update(long_factor=[2.0] * 8), ERROR, False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spoil", "severity", "alone"), BROKEN, ids=[f"{row[0]}-{n}" for n, row in enumerate(BROKEN)]
)
def test_each_wrong_config_is_named_and_mended(
    write: Callable[..., Path], record: Record, name: str, spoil: Callable[[Config], Any], severity: str, alone: bool
) -> None:
    path = write(spoil)
    found = only(path, name)
    assert found.severity == severity
    assert (found.changes is not None) == alone
    before = path.read_bytes()
    if alone:
        assert repair(path) == [path]
    else:
        assert found.mended_by == "--fix --scaling FILE"
        assert (repair(path), path.read_bytes()) == ([], before)
        assert repair(path, record()) == [path]
        assert read_scaling(path) == record()
    assert names(path) == set()


def test_what_the_repairs_write(write: Callable[..., Path]) -> None:
    path = write(
        lambda config: (
            everywhere(config, factor=8.0) or without(config, "attention_factor", "long_mscale", "short_mscale")
        )
    )
    repair(path)
    rope = json.loads(path.read_text())["rope_scaling"]
    assert rope["factor"] == 4.0
    # transformers computed it from the factor, and still does
    assert rope["attention_factor"] == pytest.approx(math.sqrt(1 + math.log(8) / math.log(512)))
    path = write(lambda config: config.update(max_position_embeddings=512))
    repair(path)
    assert json.loads(path.read_text())["max_position_embeddings"] == 2048
    path = write(lambda config: config.pop("rope_scaling") and config.pop("rope_theta"))
    repair(path)
    config = json.loads(path.read_text())
    assert config["rope_scaling"] == config["rope_parameters"]
    assert config["rope_theta"] == 10000.0


def test_different_mscales_are_meant_where_a_record_says_so(write: Callable[..., Path], record: Record) -> None:
    scaling = record(long_attention_factor=1.4, short_attention_factor=1.0)
    assert names(write(ours=True, scaling=scaling)) == set()
    assert names(write(scaling=scaling)) == {"H11"}


def test_a_record_that_disagrees_or_cannot_be_read(write: Callable[..., Path], record: Record) -> None:
    path = write(lambda config: everywhere(config, long_factor=[2.0] * 8), ours=True)
    assert only(path, "H23").mended_by == "--fix --scaling FILE"
    repair(path, record())
    assert names(path) == set()
    assert read_scaling(path) == record()
    path = write(lambda config: config.update({OURS: {"format": "longrope-export/99"}}), ours=True)
    assert only(path, "H23").mended_by == "--fix"
    repair(path)
    assert OURS not in json.loads(path.read_text())
    path = write(lambda config: config.pop("rope_scaling") and config.pop("rope_parameters"), ours=True)
    assert names(path) == {"H23"}


@pytest.mark.parametrize("text", ["{", '{"model_type": NaN}', "[]", '{"a": 1, "a": 2}'])
def test_a_config_that_is_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert [(found.rule.name, found.severity, found.mended_by) for found in examine(tmp_path)] == [("H24", ERROR, None)]
    assert repair(tmp_path) == []


def test_a_record_is_no_patient(tmp_path: Path, record: Record) -> None:
    (tmp_path / "longrope.json").write_text(record().to_json())
    with pytest.raises(InputFileError, match="not a model's configuration"):
        examine(tmp_path / "longrope.json")


ADVICE = {
    "llama": {"H04", "H12", "H14", "H15", "H16", "H17", "H18"},
    "mistral": {"H04", "H12", "H14", "H15", "H16", "H17", "H18"},
    "qwen2": {"H04", "H12", "H13", "H15", "H16", "H17", "H18", "H19"},
    "qwen3": {"H04", "H12", "H13", "H15", "H16", "H17", "H18", "H19", "H20"},
    "phi3": {"H16", "H17", "H18"},
    "granite": {"H04", "H12", "H15", "H16", "H17", "H18"},
}


@pytest.mark.parametrize("model_type", list(ADVICE))
def test_what_is_good_to_know(write: Callable[..., Path], record: Record, model_type: str) -> None:
    path = write(model_type=model_type, scaling=record(128 if model_type == "qwen3" else 16))
    assert names(path, INFORMATION) == ADVICE[model_type]


def test_unusual_factors_alone_are_information(write: Callable[..., Path]) -> None:
    path = write(lambda config: everywhere(config, long_factor=[1.0, 0.9, 2.0, 3.0, 2.5, 6.0, 7.0, 8.0]))
    assert only(path, "H21").severity == INFORMATION


def test_a_multimodal_config_is_mended_in_its_language_part(tmp_path: Path, record: Record) -> None:
    config = extended_config({"model_type": "llama", **SIZES}, record())
    inner = {key: value for key, value in config.items() if key not in ("model_type", OURS)}
    inner["rope_scaling"].update(type="longrope")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "text_config": inner}))
    assert names(tmp_path) == {"H05"}
    repair(tmp_path)
    assert names(tmp_path) == set()
    repaired = json.loads((tmp_path / "config.json").read_text())
    assert "type" not in repaired["text_config"]["rope_scaling"]


def test_a_finished_folder_stays_finished(small_llama: Path, record: Record, tmp_path: Path) -> None:
    scaling = record(32)
    write_hf_folder(small_llama, tmp_path / "out", scaling)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["rope_scaling"]["long_factor"] = [5.0] * 16
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert "H22" in names(tmp_path / "out")
    assert repair(tmp_path / "out", scaling) == [tmp_path / "out" / "config.json"]
    assert names(tmp_path / "out") == set()
    check_manifest(tmp_path / "out")
    assert read_scaling(tmp_path / "out") == scaling


def test_a_record_of_another_model_is_refused(write: Callable[..., Path], record: Record) -> None:
    path = write(lambda config: without(config, "short_factor"))
    before = path.read_bytes()
    with pytest.raises(ScalingError, match="made for another model"):
        repair(path, record(32))
    assert path.read_bytes() == before


@pytest.fixture
def extended(small_llama: Path, record: Record, tmp_path: Path) -> Any:
    logging.disable(logging.WARNING)  # transformers warns about short_mscale and long_mscale
    write_hf_folder(small_llama, tmp_path / "hf", record(32))
    yield tmp_path / "hf"
    logging.disable(logging.NOTSET)


def edit(folder: Path, spoil: Callable[[Config], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop(OURS)
    spoil(config)
    (folder / "config.json").write_text(json.dumps(config))


def logits(folder: Path) -> Any:
    """Of 700 tokens, which is beyond the original window of 512."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(700)[None] * 7 % 600
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[0, -1].numpy()


@pytest.mark.parametrize(
    ("name", "spoil", "symptom"),
    [
        ("H01", lambda config: everywhere(config, long_factor=[1.0] * 7), RuntimeError),
        ("H02", lambda config: without(config, "short_factor"), KeyError),
        ("H03", lambda config: without(config, "original_max_position_embeddings"), "differs"),
        ("H06", lambda config: [p.update(type="su") or p.pop("rope_type") for p in both(config)], KeyError),
        ("H21", lambda config: everywhere(config, long_factor=[0.0] * 16), "nan"),
        ("H22", lambda config: config["rope_scaling"].update(long_factor=[2.0] * 16), "differs"),
    ],
)
def test_transformers_shows_the_symptom_and_the_cure(
    extended: Path, record: Record, name: str, spoil: Callable[[Config], Any], symptom: Any
) -> None:
    right = logits(extended)
    edit(extended, spoil)
    assert name in names(extended)
    if isinstance(symptom, str):
        wrong = logits(extended)
        assert np.isnan(wrong).all() if symptom == "nan" else np.abs(wrong - right).max() > 0.5
    else:
        with pytest.raises(symptom):
            logits(extended)
    repair(extended, record(32))
    assert np.abs(logits(extended) - right).max() < 1e-4
