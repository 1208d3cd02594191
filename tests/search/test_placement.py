"""Models larger than one device: placed by accelerate, they measure, descend and search exactly as in one piece."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from longrope_export.cli.search import search
from longrope_export.errors import InputFileError, LongRopeError
from longrope_export.fingerprint import fingerprint
from longrope_export.loader import load
from longrope_export.placement import (
    compute_devices,
    input_device,
    is_offloaded,
    placement_options,
    weight_places,
)
from longrope_export.search.config import SearchConfig
from longrope_export.search.documents import with_plain_losses
from longrope_export.search.executors import ModelSource
from longrope_export.search.factors import search_factors
from longrope_export.search.measuring import check_measuring
from longrope_export.search.memory import memory_plan
from longrope_export.search.objective import ModelObjective
from longrope_export.search.protocol import SEARCH, Trial
from longrope_export.search.space import closed_form

ON_DISK = ("model.embed_tokens", "model.layers.1", "lm_head")
MAP = {**dict.fromkeys(ON_DISK, "disk"), "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


def _held(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.device.type != "meta"}


@pytest.fixture
def placed(tiny_llama: Path) -> Any:
    """The tiny model with its embedding, its second layer and its head on the disk."""
    return load(tiny_llama, dtype="float32", device_map=MAP)


@pytest.mark.parametrize("recompute", [None, True, False])
def test_losses_and_gradients_are_those_of_the_model_in_one_piece(
    tiny: Any, tiny_llama: Path, placed: Any, recompute: bool | None
) -> None:
    whole = load(tiny_llama, dtype="float32")
    documents, yarn = {SEARCH: tiny.rows[:1]}, closed_form("yarn", tiny.numbers)
    expected = ModelObjective(whole, tiny.numbers, documents, recompute=bool(recompute))
    objective = ModelObjective(placed, tiny.numbers, documents, recompute=recompute)
    held = _held(placed)
    assert objective.recompute is (recompute is not False)
    for trial in (Trial(yarn, SEARCH, 0), Trial(yarn, SEARCH, 0, gradient=True), Trial(yarn, SEARCH, 0)):
        assert objective.measure(trial) == expected.measure(trial)
        assert _held(placed) == held, "a weight that was brought for one pass stayed in memory"
    assert objective.measure(Trial(yarn, SEARCH, 0)) != objective.measure(Trial(tiny.numbers.unchanged(), SEARCH, 0))
    objective.close()


def test_where_a_placed_model_computes_and_what_it_needs(tiny: Any, placed: Any) -> None:
    assert is_offloaded(placed)
    assert str(input_device(placed)) == "cpu"
    assert list(map(str, compute_devices(placed))) == ["cpu"]
    sizes = {name: weight.numel() * 4 for name, weight in placed.named_parameters()}
    disk = sum(size for name, size in sizes.items() if name.startswith(ON_DISK))
    assert weight_places(placed) == {"disk": disk, "cpu": sum(sizes.values()) - disk}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.1"))
    whole, plan = (memory_plan(each, 128, recompute=True) for each in (tiny.model, placed))
    assert (plan.evaluation - whole.evaluation, plan.gradient - whole.gradient) == (layer, layer)
    assert plan.weights == weight_places(placed)


def test_a_search_in_memory_needs_the_files_fingerprint(tiny: Any, tiny_llama: Path, placed: Any) -> None:
    config = SearchConfig(budget="14", documents=1, validation_documents=1, short="original")
    with pytest.raises(LongRopeError, match="fingerprint="):
        search_factors(placed, tiny.numbers, tiny.rows, config)
    result = search_factors(placed, tiny.numbers, tiny.rows, config, fingerprint=fingerprint(tiny_llama))
    assert result.scaling.provenance["model"] == fingerprint(tiny_llama)


def test_everything_on_the_disk_computes_on_the_cpu(tiny_llama: Path) -> None:
    model = load(tiny_llama, dtype="float32", device_map={"": "disk"})
    assert _held(model) == set()
    assert str(input_device(model)) == "cpu"
    assert list(weight_places(model)) == ["disk"]


def _searched(folder: Path, text: Path, out: Path, *more: str) -> bytes:
    arguments = [str(folder), "--to", "4x", "--data", str(text), "--out", str(out), "--budget", "14"]
    options = ["--documents", "1", "--validation-documents", "1", "--threads", "1", "--short", "original"]
    result = CliRunner().invoke(search, [*arguments, *options, *more])
    if result.exception:
        raise result.exception
    return (out / "longrope.json").read_bytes() if (out / "longrope.json").exists() else result.stdout.encode()


def test_the_command_places_the_model_and_ends_in_the_same_bytes(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps(MAP))
    limits = ("--device-map", "auto", "--max-memory", "cpu=150KB")
    places = {
        name: json.loads(_searched(tiny_folder, text, tmp_path / "dry", *options, "--dry-run", "--json"))["memory"]
        for name, options in (("file", ("--device-map", str(tmp_path / "map.json"))), ("limits", limits))
    }
    assert set(places["file"]["weights"]) == {"disk", "cpu"}
    assert "disk" in places["limits"]["weights"]
    whole = _searched(tiny_folder, text, tmp_path / "whole")
    assert _searched(tiny_folder, text, tmp_path / "placed", *limits) == whole


def test_workers_place_their_models_too(tiny: Any, tiny_llama: Path) -> None:
    documents = with_plain_losses({SEARCH: tiny.rows[:1]})
    source = ModelSource(
        tiny_llama, "float32", tiny.numbers, documents, 1, fingerprint(tiny_llama), {"device_map": MAP}
    )
    with source.open() as objective:
        assert is_offloaded(objective.model)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("device_map", "max_memory", "words"),
    [
        ("cuda:99", None, "cuda:99"),
        ("gpu", None, "gpu"),
        (None, "cpu=1GB", "--device-map auto"),
        ("cpu", "cpu=1GB", "--device-map auto"),
        ("auto", "cpu=much", "cpu=much"),
        ("auto", "disk=1GB", "disk=1GB"),
    ],
)
def test_what_cannot_be_placed_is_one_line(device_map: str | None, max_memory: str | None, words: str) -> None:
    with pytest.raises(LongRopeError, match=words) as caught:
        placement_options(device_map, max_memory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[1]", '{"": [1]}', "{", None, '{"": "cuda:99"}'])
def test_a_file_that_is_no_device_map_is_one_line(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(LongRopeError, match=r"map\.json|cuda:99") as caught:
        placement_options(str(path))
    assert "\n" not in str(caught.value)


def test_options_are_those_of_from_pretrained(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text('{"": 0}'.replace("0", '"cpu"'))
    assert placement_options(None) == {}
    assert placement_options("cpu") == {"device_map": "cpu"}
    assert placement_options(str(tmp_path / "map.json")) == {"device_map": {"": "cpu"}}
    assert placement_options("auto", "0=20GiB, cpu=1.5GB") == {
        "device_map": "auto", "max_memory": {0: "20GiB", "cpu": "1.5GB"}
    }  # fmt: skip


def test_a_gguf_cannot_lie_on_the_disk(write_random_gguf: Any, tmp_path: Path) -> None:
    gguf = write_random_gguf(tmp_path / "model.gguf")
    with pytest.raises(InputFileError, match="cannot stay on the disk"):
        load(gguf, device_map={"": "disk"})
    with pytest.raises(InputFileError, match=r"^transformers cannot load [^\n]*offload"):
        load(gguf, device_map="auto", max_memory={"cpu": "500KB"})


def test_llama_cpp_is_not_placed() -> None:
    config = SearchConfig(objective="llamacpp", strategy="cmaes", device_map="auto")
    with pytest.raises(LongRopeError, match="--device-map"):
        check_measuring(config, "gguf", lambda *_: None)


SHARDED = """
import os, sys
import numpy as np
import torch
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from longrope_export.loader import load
from longrope_export.rotary import decoder_of
from longrope_export.search.objective import ModelObjective
from longrope_export.search.protocol import SEARCH, Trial
from longrope_export.search.run import SearchConfig, search_factors
from longrope_export.search.space import RopeNumbers, closed_form

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
folder, out, sharded = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "sharded"
numbers = RopeNumbers(rope_theta=10000.0, rotary_dim=32, window=32, target=128)
rows = list(np.random.default_rng(0).integers(3, 97, (4, 128)))
model = load(folder, dtype="float32")
if sharded:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in decoder_of(model).layers:
        fully_shard(layer, mesh=mesh)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.to_local().numel() < weight.numel()
objective = ModelObjective(model, numbers, {SEARCH: rows}, recompute=True)
outcome = objective.measure(Trial(closed_form("yarn", numbers), SEARCH, 0, gradient=True))
objective.close()
config = SearchConfig(budget="14", documents=2, validation_documents=2, short="original")
result = search_factors(model, numbers, rows, config, fingerprint="the folder's")
name = f"{sys.argv[3]}-{torch.distributed.get_rank()}"
(out / name).write_text(repr(outcome) + result.scaling.to_json())
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_layers_sharded_by_fsdp_give_the_same_search_on_every_rank(tiny_llama: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    for kind, ranks in (("whole", 1), ("sharded", 2)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        subprocess.run([*command, str(script), str(tiny_llama), str(tmp_path), kind], check=True, timeout=280)
    whole, *sharded = ((tmp_path / name).read_text() for name in ("whole-0", "sharded-0", "sharded-1"))
    assert sharded == [whole, whole]
