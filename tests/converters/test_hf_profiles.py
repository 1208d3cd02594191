"""Profiles of config.json: each is read by its runtime's rule (transcribed here) and, unchanged, by transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.cli.main import cli
from longrope_export.converters.doctor.examine import examine
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.converters.hf_profiles import DEFAULT, PROFILES, default_misreaders, profile_config
from longrope_export.converters.lossy import one_set_record
from longrope_export.errors import LossyTargetError, UnsupportedModelError
from longrope_export.families import FAMILIES
from longrope_export.formats.records import read_scaling
from longrope_export.rope.formulas import longrope_attention_factor

pytestmark = pytest.mark.usefixtures("quiet")
Record = Callable[..., RopeScaling]
FORMULA = longrope_attention_factor(4.0, 512)


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, small_llama: Path, small_config: dict[str, Any]
) -> dict[str, Path]:
    from transformers import Phi3Config, Phi3ForCausalLM

    path = tmp_path_factory.mktemp("profiles") / "phi3"
    Phi3ForCausalLM(Phi3Config(**small_config, pad_token_id=0, original_max_position_embeddings=512)).save_pretrained(
        path
    )
    return {"llama": small_llama, "phi3": path}


def exllama_v2(config: dict[str, Any], max_seq_len: int) -> tuple[list[float], float]:
    """ExLlamaV2 da07fac, exllamav2/config.py and rope.py: factors and the multiplier of cos and sin."""
    scaling = config["rope_scaling"]
    kinds = [scaling[key] for key in ("type", "rope_type") if scaling.get(key)]
    assert len(kinds) == 1
    assert kinds[0] in ("su", "longrope")
    longest, original = config["max_position_embeddings"], config["original_max_position_embeddings"]
    if max_seq_len <= original:
        return scaling["short_factor"], 1.0
    return scaling["long_factor"], math.sqrt(1 + math.log(longest / original) / math.log(original))


def mlx_phi3(config: dict[str, Any]) -> tuple[list[float], float]:
    """mlx-lm d78bf58e, mlx_lm/models/phi3.py and rope_utils.py (SuScaledRoPE)."""
    scaling = config["rope_scaling"]
    if not all(key in scaling for key in ("long_factor", "type")):
        raise ValueError("rope_scaling must contain keys")
    assert scaling["type"] in ("longrope", "su", "linear")
    ratio = config["max_position_embeddings"] / config["original_max_position_embeddings"]
    return scaling["long_factor"], math.sqrt(1 + math.log(ratio) / math.log(config["original_max_position_embeddings"]))


def sglang(config: dict[str, Any], positions: list[int]) -> list[float]:
    """SGLang 0b1fd02d, srt/layers/rotary_embedding/factory.py and rope_variant.py: the batch's factors."""
    scaling = config["rope_scaling"]
    kind = scaling["rope_type"] if "rope_type" in scaling else scaling["type"]
    assert kind == "longrope"
    original = scaling.get("original_max_position_embeddings", config["max_position_embeddings"])
    factors: list[float] = (
        scaling["long_factor"] if any(place > original for place in positions) else scaling["short_factor"]
    )
    return factors


def write(folder: Path, out: Path, scaling: RopeScaling, profile: str) -> dict[str, Any]:
    write_hf_folder(folder, out, scaling, profile=profile, allow_lossy=True)
    config: dict[str, Any] = json.loads((out / "config.json").read_text())
    return config


@pytest.mark.parametrize(("family", "profile"), [
    ("llama", DEFAULT), ("llama", "exllamav2"), ("llama", "sglang"), ("phi3", "mlx-phi3"),
])  # fmt: skip
def test_transformers_reads_every_profile(
    folders: dict[str, Path], record: Record, tmp_path: Path, family: str, profile: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    write(folders[family], tmp_path / "out", record(32), profile)
    written = one_set_record(record(32)) if profile == "sglang" else record(32)
    assert read_scaling(tmp_path / "out") == written
    assert {found.severity for found in examine(tmp_path / "out")} <= {"information"}
    rotary = AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.rotary_emb
    for length, factors in ((512, written.short_factor), (513, written.long_factor)):
        rotary(torch.zeros(1), torch.arange(length)[None])
        wanted = 1 / (np.array(factors) * 1e4 ** (np.arange(16) / 16))
        np.testing.assert_allclose(rotary.inv_freq.numpy(), wanted, rtol=1e-6)
        assert rotary.attention_scaling == pytest.approx(1.1)


def test_exllama_v2_finds_what_it_needs_in_its_profile_only(
    folders: dict[str, Path], record: Record, tmp_path: Path
) -> None:
    scaling = record(32, long_attention_factor=FORMULA, short_attention_factor=FORMULA)
    plain = write(folders["llama"], tmp_path / "default", scaling, DEFAULT)
    with pytest.raises(KeyError, match="original_max_position_embeddings"):
        exllama_v2(plain, 2048)
    config = write(folders["llama"], tmp_path / "out", scaling, "exllamav2")
    assert exllama_v2(config, 2048) == (list(scaling.long_factor), pytest.approx(FORMULA))
    assert exllama_v2(config, 512) == (list(scaling.short_factor), 1.0)
    assert PROFILES["exllamav2"].losses(scaling) == [
        f"ExLlamaV2 will take the attention factor 1 in short contexts, not {FORMULA:.6g}"
    ]
    assert PROFILES["exllamav2"].losses(record(32))[0].endswith(f"{FORMULA:.6g}, not 1.1")


def test_mlx_reads_a_phi3_in_its_profile_only(folders: dict[str, Path], record: Record, tmp_path: Path) -> None:
    scaling = record(32, long_attention_factor=FORMULA, short_attention_factor=FORMULA)
    with pytest.raises(ValueError, match="must contain keys"):
        mlx_phi3(write(folders["phi3"], tmp_path / "default", scaling, DEFAULT))
    config = write(folders["phi3"], tmp_path / "out", scaling, "mlx-phi3")
    assert mlx_phi3(config) == (list(scaling.long_factor), pytest.approx(FORMULA))
    with pytest.raises(UnsupportedModelError, match="mlx-lm reads the default of llama"):
        write(folders["llama"], tmp_path / "no", scaling, "mlx-phi3")
    with pytest.raises(LossyTargetError, match="long factors for short prompts"):
        write_hf_folder(folders["phi3"], tmp_path / "no", scaling, profile="mlx-phi3")
    assert not (tmp_path / "no").exists()


def test_sglang_cannot_switch_in_its_profile(folders: dict[str, Path], record: Record, tmp_path: Path) -> None:
    below, beyond = [0, 511], [0, 600]
    default = write(folders["llama"], tmp_path / "default", record(32), DEFAULT)
    assert sglang(default, below) != sglang(default, beyond)
    config = write(folders["llama"], tmp_path / "out", record(32), "sglang")
    assert sglang(config, below) == sglang(config, beyond) == list(record(32).long_factor)


def test_the_default_s_misreaders_are_named(record: Record) -> None:
    llama, phi3 = FAMILIES["llama"], FAMILIES["phi3"]
    told = " ".join(default_misreaders(llama, record(32)))
    for words in (
        "--max-model-len exceeds 512",
        "--for sglang",
        "mlx-lm uses the long",
        "--for exllamav2",
        "factor 1.1",
    ):
        assert words in told
    assert "--for mlx-phi3" in " ".join(default_misreaders(phi3, record(32)))
    one = one_set_record(record(32, long_attention_factor=FORMULA))
    assert default_misreaders(phi3, one) == ["mlx-lm refuses a phi3 without the key `type` (--for mlx-phi3)"]
    with pytest.raises(UnsupportedModelError, match="no profile 'vllm'; there are: default, exllamav2"):
        profile_config({}, record(32), "vllm")


def test_the_command_line(folders: dict[str, Path], record: Record, tmp_path: Path) -> None:
    (tmp_path / "longrope.json").write_text(record(32).to_json())

    def run(name: str, *options: str) -> Any:
        common = ["--scaling", str(tmp_path / "longrope.json"), "--out", str(tmp_path / name)]
        return CliRunner().invoke(cli, ["export", str(folders["llama"]), *common, *options])

    done = run("default", "--no-gguf")
    assert done.exit_code == 0, done.output
    assert "note: ExLlamaV2 does not find" in done.output
    done = run("exllama", "--no-gguf", "--for", "exllamav2", "--allow-lossy")
    assert done.exit_code == 0, done.output
    assert "lost: ExLlamaV2 will take the attention factor 1 in short contexts" in done.output
    assert json.loads((tmp_path / "exllama" / "config.json").read_text())["original_max_position_embeddings"] == 512
    assert run("no", "--for", "exllamav2").exit_code == 2
    assert run("no", "--for", "exllamav2", "--writer", "x").exit_code == 2
