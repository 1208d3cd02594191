"""Several processes: the loss curve of one, and launchers' configurations that accelerate itself reads."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import start, wait
from finetune_case import Case
from safetensors.torch import load_file

from longrope_export.errors import LongRopeError
from longrope_export.training.finetune import FinetuneStopped, run
from longrope_export.training.processes import SharedError, any_of_all, first_on_main

EXAMPLES = sorted((Path(__file__).parents[2] / "examples/accelerate").glob("*.yaml"))
posix = pytest.mark.skipif(os.name == "nt", reason="needs fork")


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


def in_two_processes(work: Callable[[], object], folder: Path, environment: dict[str, str] | None = None) -> list[int]:
    """Exit codes of two children that form one group over gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"OMP_NUM_THREADS": "1", **(environment or {})}
    folder.mkdir(exist_ok=True)
    children = [
        start(work, folder / f"output-{rank}", {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]
    return [wait(child) for child in children]


def as_gpus() -> None:
    """Let accelerate take this process for one with a GPU: it offers FSDP to them alone, and torch can do it on a CPU."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    real = AcceleratorState.__init__

    def init(self: Any, *arguments: Any, **options: Any) -> None:
        PartialState()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        real(self, *arguments, **options)

    AcceleratorState.__init__ = init


def numbers(folder: Path) -> dict[tuple[int, str], float]:
    """What log.jsonl has of the curves, by step and name."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    names = ("loss", "grad_norm", "learning_rate", "eval_perplexity_32_short", "eval_perplexity_128_long")
    return {(line["step"], name): line[name] for line in lines for name in names if name in line}


@posix
@pytest.mark.parametrize(
    ("environment", "changes"),
    [
        ({}, {}),
        pytest.param(FSDP2, {}, marks=pytest.mark.slow),
        pytest.param(FSDP2, {"train": "lora"}, marks=pytest.mark.slow),
    ],
    ids=["ddp", "fsdp2", "fsdp2-lora"],
)
def test_two_processes_have_the_loss_curve_of_one(
    case: Case, tmp_path: Path, environment: dict[str, str], changes: dict[str, Any]
) -> None:
    """Rows with different numbers of labels, long and short sets, gradient accumulation, measurements; and a stop."""
    changes = {"positions": "mixed", "eval_documents": 3, "micro_batch": 1, "schedule": "constant", **changes}
    run(case.config(tmp_path / "one", **changes))
    two = case.config(tmp_path / "two", cache=tmp_path / "cache", **changes)

    def work(until: int | None) -> None:
        if environment:
            as_gpus()

        asked: list[int] = []

        def stop(done: int, steps: int, status: str) -> None:
            if done == until and f"step {until}" in status and not asked:
                asked.append(done)
                os.kill(os.getpid(), signal.SIGTERM)  # the first process alone is asked

        if until is None:
            run(two)
        else:
            with pytest.raises(FinetuneStopped, match="step 3"):
                run(two, stop)

    for until in (2, None):
        codes = in_two_processes(lambda until=until: work(until), tmp_path / f"outputs-{until}", environment)
        assert codes == [0, 0], (tmp_path / f"outputs-{until}/output-0").read_text()[-3000:]
        if until:
            files = {path.name for path in (two.out / "training/checkpoints/checkpoint-3").iterdir()}
            assert ("pytorch_model_fsdp_0" in files) == bool(environment)
    found, expected = numbers(tmp_path / "two"), numbers(tmp_path / "one")
    assert found == pytest.approx(expected, rel=2e-4)
    assert len({value for (_, name), value in expected.items() if name == "loss"}) == 4
    weights, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    assert weights.keys() == wanted.keys()
    assert all(torch.allclose(weights[name], wanted[name], atol=1e-5) for name in wanted)


@posix
def test_an_error_of_the_first_process_ends_all(tmp_path: Path) -> None:
    def work() -> None:
        from torch import distributed

        distributed.init_process_group("gloo")
        rank = distributed.get_rank()
        done: list[int] = []
        first_on_main(lambda: done.append(rank))
        assert done == ([0] if rank == 0 else [])
        assert any_of_all(rank == 1)
        assert not any_of_all(False)

        def fail() -> None:
            raise LongRopeError("no such text")

        with pytest.raises(LongRopeError, match="no such text") as found:
            first_on_main(fail)
        assert isinstance(found.value, SharedError) == (rank == 1)
        distributed.destroy_process_group()

    assert in_two_processes(work, tmp_path) == [0, 0], (tmp_path / "output-1").read_text()[-2000:]


def test_rows_that_cannot_be_shared_are_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longrope_export.training.arguments import accumulation

    assert accumulation(case.config(tmp_path, batch=32, micro_batch=2), 8) == 2
    with pytest.raises(LongRopeError, match=r"--batch 4 cannot be shared evenly by 8 processes .*multiple of 16"):
        accumulation(case.config(tmp_path), 8)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    assert accumulation(case.config(tmp_path, batch=32, micro_batch=2), 8) == 8


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_configurations(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by accelerate's own class, and through its launcher into what a process would be given."""
    from accelerate import FullyShardedDataParallelPlugin, ParallelismConfig
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config: Any = load_config_from_file(str(path))
    assert (config.num_processes, config.num_machines) == (8, 1)
    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "-m", "longrope_export", "finetune"])
    )
    environment = prepare_multi_gpu_env(arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == path.stem.startswith("fsdp2")
    if path.stem.startswith("fsdp2"):
        plugin = FullyShardedDataParallelPlugin()
        assert (plugin.fsdp_version, plugin.activation_checkpointing) == (2, False)
        assert plugin.reshard_after_forward is True
    parallel = environment.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true"
    assert parallel == ("context_parallel" in path.stem)
    if parallel:
        found = ParallelismConfig()
        assert (found.cp_size, found.dp_shard_size, found.total_size) == (4, 2, 8)


def test_there_are_three_examples() -> None:
    assert [path.stem for path in EXAMPLES] == ["ddp", "fsdp2", "fsdp2_context_parallel"]
