"""`run`: the folder that it leaves, and that a killed, interrupted or full-disk run ends with the same weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from children import start, wait
from finetune_case import TARGET, WINDOW, Case, record, write_texts
from full_disk import can_mount, on_small_disk
from safetensors.torch import load_file

from longrope_export import load
from longrope_export.errors import InputFileError, OutputError, StaleStateError
from longrope_export.files import check_manifest
from longrope_export.formats.records import read_scaling
from longrope_export.training.checkpoints import Checkpoints
from longrope_export.training.config import FinetuneConfig
from longrope_export.training.finetune import FinetuneResult, FinetuneStopped, run

# Dropout draws random numbers, which a resumed run has to continue.
LORA = {"train": "lora", "lora_dropout": 0.1, "positions": "mixed"}
POSE = {"positions": "pose", "optimizer": "adafactor"}


@pytest.fixture(scope="module")
def whole(case: Case, tmp_path_factory: pytest.TempPathFactory) -> FinetuneResult:
    """Four steps with full weights, never stopped."""
    return run(case.config(tmp_path_factory.mktemp("whole") / "out", eval_documents=2))


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(first: Path, second: Path) -> None:
    found, expected = weights(first), weights(second)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_folder_is_a_model_with_its_factors(case: Case, whole: FinetuneResult) -> None:
    folder = whole.folder
    assert {path.name for path in folder.iterdir()} == {*check_manifest(folder), "manifest.json"}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / "longrope.json").stat().st_mode & 0o777
    }
    assert replace(read_scaling(folder), provenance={}) == record()
    assert read_scaling(folder).provenance["finetuned"]["--steps"] == 4
    config = json.loads((folder / "config.json").read_text())
    assert (config["use_cache"], config["max_position_embeddings"], config["dtype"]) == (True, TARGET, "float32")
    assert config["rope_parameters"]["rope_type"] == "longrope"
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == TARGET
    base = load_file(case.model / "model.safetensors")
    assert all(not torch.equal(weight, base[name]) for name, weight in weights(folder).items())
    assert any(case.cache.rglob("manifest.json"))


def test_the_written_model_has_the_perplexities_of_the_last_measurement(case: Case, whole: FinetuneResult) -> None:
    from longrope_export.evaluation.perplexity import evaluate_perplexity
    from longrope_export.training.corpus import read_corpus
    from longrope_export.training.inputs import check_inputs

    config = case.config(whole.folder, eval_documents=2)
    rows = read_corpus(config, check_inputs(config), whole.folder, lambda done, everything, status: None).held
    found = evaluate_perplexity(load(whole.folder), rows, [WINDOW, TARGET])
    after = whole.summary["after"]
    assert found.at(WINDOW).perplexity == pytest.approx(after["perplexity_32_short"], rel=1e-4)
    assert found.at(TARGET).perplexity == pytest.approx(after["perplexity_128_long"], rel=1e-4)
    assert after["perplexity_128_long"] < 0.8 * whole.summary["before"]["perplexity_128_long"]


def test_log_lines(whole: FinetuneResult) -> None:
    lines = log(whole.folder)
    measured = [line["step"] for line in lines if "eval_perplexity_128_long" in line]
    assert measured == [0, 2, 4]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert [line["learning_rate"] for line in steps] == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])
    assert all(line["tokens_per_second"] > 0 and line["grad_norm"] > 0 for line in steps)
    assert whole.summary["loss"] == steps[-1]["loss"] < steps[0]["loss"]


def test_eval_every_save_every_and_log_every(case: Case, tmp_path: Path) -> None:
    lines: list[str] = []
    saved: list[str] = []
    checkpoints = tmp_path / "out/training/checkpoints"

    def look(step: int, steps: int, status: str) -> None:
        saved.extend(path.name for path in checkpoints.glob("checkpoint-*") if path.name not in saved)

    config = case.config(tmp_path / "out", steps=6, eval_every=3, save_every=4, log_every=2, batch=1, micro_batch=1)
    run(config, look, lines.append)
    entries = log(tmp_path / "out")
    assert [line["step"] for line in entries if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in entries if "eval_perplexity_32_short" in line] == [0, 3, 6]
    assert saved == ["checkpoint-4", *saved[1:]]
    assert not checkpoints.exists()
    note, *steps = lines
    assert "are not trained on: long rows take documents of 128 tokens or more" in note
    assert [line.split(":")[0] for line in steps] == ["step 0", "step 3", "step 6"]


def test_the_same_command_again_finds_the_finished_run(case: Case, whole: FinetuneResult) -> None:
    before = (whole.folder / "model.safetensors").stat().st_mtime_ns
    again = run(case.config(whole.folder, eval_documents=2))
    assert again.summary == whole.summary
    assert (whole.folder / "model.safetensors").stat().st_mtime_ns == before
    assert not (whole.folder / "training").exists()


def test_a_gguf_becomes_a_folder(
    case: Case, tmp_path: Path, write_random_gguf: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from longrope_export.training import corpus

    # The random file's own tokenizer is one that transformers cannot read.
    tokenizer = corpus.load_tokenizer(case.model)
    monkeypatch.setattr(corpus, "load_tokenizer", lambda model: tokenizer)
    scaling = record(original_max_position_embeddings=256, max_position_embeddings=512)
    (tmp_path / "longrope.json").write_text(scaling.to_json())
    config = FinetuneConfig(
        model=write_random_gguf(tmp_path / "model.gguf"), scaling=tmp_path / "longrope.json", out=tmp_path / "out",
        data=(write_texts(tmp_path / "texts", 0, long=4, short=0),), positions="pose", length="64", steps=2, batch=1,
        eval_documents=0, warmup=0, learning_rate=1e-2, train="lora", threads=1,
    )  # fmt: skip
    run(config)
    model, base = load(tmp_path / "out", switch="long"), load(tmp_path / "model.gguf", scaling, switch="long")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert not torch.allclose(model(ids).logits, base(ids).logits, atol=1e-3)
    assert replace(read_scaling(tmp_path / "out"), provenance={}) == scaling


def kill_at(step: int) -> Callable[[int, int, str], None]:
    def progress(done: int, steps: int, status: str) -> None:
        if done == step and "loss" in status:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize(
    "changes", [{}, LORA, pytest.param(POSE, marks=pytest.mark.slow)], ids=["full", "lora", "pose"]
)
def test_a_killed_run_ends_with_the_same_bits(
    case: Case, whole: FinetuneResult, tmp_path: Path, changes: dict[str, Any]
) -> None:
    straight = whole.folder
    changes = {"eval_documents": 2, **changes}
    if len(changes) > 1:
        straight = run(case.config(tmp_path / "straight", **changes)).folder
    config = case.config(tmp_path / "killed", **changes)
    for step, saved in ((1, []), (3, ["checkpoint-2"]), (4, ["checkpoint-2"])):
        assert wait(start(lambda step=step: run(config, kill_at(step)), tmp_path / "output")) == -signal.SIGKILL
        assert sorted(path.name for path in (config.out / "training/checkpoints").glob("c*")) == saved
        assert not (config.out / "manifest.json").exists()
    run(config)
    assert_same_bits(config.out, straight)
    lines, expected = ([(line["step"], line.get("loss")) for line in log(folder)] for folder in (config.out, straight))
    assert lines == expected


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize("place", ["write_manifest", pytest.param("sync_folder", marks=pytest.mark.slow)])
def test_killed_while_a_checkpoint_is_written_the_one_before_counts(
    case: Case, whole: FinetuneResult, tmp_path: Path, place: str
) -> None:
    """Before its rename the new checkpoint is nothing; after it, it counts, although the old one is still there."""
    import longrope_export.training.checkpoints as module

    config = case.config(tmp_path / "out", eval_documents=2)
    real, calls = getattr(module, place), []

    def killing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)

    def work() -> None:
        setattr(module, place, killing)
        run(config)

    assert wait(start(work, tmp_path / "output")) == -signal.SIGKILL
    names = {path.name for path in (config.out / "training/checkpoints").glob("checkpoint-*")}
    assert names == ({"checkpoint-2"} if place == "write_manifest" else {"checkpoint-2", "checkpoint-4"})
    run(config)
    assert_same_bits(config.out, whole.folder)


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_killed_while_the_folder_is_written_it_is_not_finished(
    case: Case, whole: FinetuneResult, tmp_path: Path
) -> None:
    """The weights are in place and the manifest is not: the run counts as stopped after its last step."""
    from longrope_export.training import output

    config = case.config(tmp_path / "out", eval_documents=2)
    real = output._move

    def killing(source: Path, target: Path) -> None:
        if target.name == "manifest.json":
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    def work() -> None:
        output._move = killing
        run(config)

    assert wait(start(work, tmp_path / "output")) == -signal.SIGKILL
    assert (config.out / "model.safetensors").is_file()
    assert not (config.out / "manifest.json").exists()
    said: list[str] = []
    result = run(config, None, said.append)
    assert "continuing from step 4" in said
    assert result.summary["after"] == whole.summary["after"]
    assert_same_bits(config.out, whole.folder)
    check_manifest(config.out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_it_saves_and_continues(
    case: Case, whole: FinetuneResult, tmp_path: Path, number: signal.Signals
) -> None:
    config = case.config(tmp_path / "out", eval_documents=2, save_every=50)
    said: list[str] = []
    asked: list[int] = []

    def stop(done: int, steps: int, status: str) -> None:
        if done == 2 and "step 2" in status and not asked:
            asked.append(done)
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(FinetuneStopped, match="stopped after step 3"):
        run(config, stop, said.append)
    assert signal.getsignal(number) is before
    assert any("with a checkpoint" in line for line in said)
    assert [path.name for path in (config.out / "training/checkpoints").iterdir()] == ["checkpoint-3"]
    run(config, None, said.append)
    assert "continuing from step 3" in said
    assert_same_bits(config.out, whole.folder)


def stopped(config: Any) -> None:
    """Leave the folder of `config` with a checkpoint after the first step."""

    def stop(done: int, steps: int, status: str) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(FinetuneStopped):
        run(config, stop)


@pytest.fixture(scope="module")
def begun(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one checkpoint."""
    out = tmp_path_factory.mktemp("begun") / "out"
    stopped(case.config(out, eval_documents=2))
    return out


REFUSED = [
    ({"positions": "pose"}, "--positions: full there, pose now"),
    ({"steps": 5}, "--steps: 4 there, 5 now"),
    ({"learning_rate": 0.002}, "--learning-rate: 0.001 there, 0.002 now"),
    ({"seed": 1}, "--seed: 0 there, 1 now"),
    ({"train": "lora"}, "--train: full there, lora now"),
    ({"length": "64"}, "--length: 128 there, 64 now"),
    ({"dtype": "bfloat16"}, "--dtype: float32 there, bfloat16 now"),
    ({"optimizer": "sgd"}, "--optimizer: adamw_torch there, sgd now"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[next(iter(changes)) for changes, _ in REFUSED])
def test_another_option_is_refused_by_name(
    case: Case, whole: FinetuneResult, begun: Path, changes: dict[str, Any], message: str
) -> None:
    for folder in (begun, whole.folder):
        with pytest.raises(StaleStateError, match="was made with another") as refused:
            run(case.config(folder, **{"eval_documents": 2, **changes}))
        assert message in str(refused.value)


def test_another_record_is_refused_by_name(case: Case, begun: Path, tmp_path: Path) -> None:
    factors = list(record().long_factor)
    factors[3] = 9.0
    (tmp_path / "other.json").write_text(record(long_factor=tuple(factors)).to_json())
    with pytest.raises(StaleStateError, match=r"record long_factor\[3\]: 1\.6\S* there, 9\.0 now"):
        run(case.config(begun, eval_documents=2, scaling=tmp_path / "other.json"))


def test_another_model_and_other_data_are_refused_by_name(case: Case, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(case.model, tmp_path / "model")
    values = weights(tmp_path / "model")
    from safetensors.torch import save_file

    save_file(
        {name: weight + 1 for name, weight in values.items()}, tmp_path / "model/model.safetensors", {"format": "pt"}
    )
    with pytest.raises(StaleStateError, match=r"another model: [0-9a-f]{64} there"):
        run(case.config(begun, eval_documents=2, model=tmp_path / "model"))
    texts = write_texts(tmp_path / "texts", 0)
    with (texts / "texts.jsonl").open("a") as file:
        file.write('{"text": "once upon a time"}\n')
    with pytest.raises(StaleStateError, match=r"another data sources\[0\] sha256"):
        run(case.config(begun, eval_documents=2, data=(texts,)))


def test_what_does_not_decide_the_weights_may_change(
    case: Case, whole: FinetuneResult, begun: Path, tmp_path: Path
) -> None:
    shutil.copytree(begun, tmp_path / "out")
    changes = {"gradient_checkpointing": False, "save_every": 3, "log_every": 2, "micro_batch": 4, "threads": 2}
    try:
        run(case.config(tmp_path / "out", eval_documents=2, **changes))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    found, expected = weights(tmp_path / "out"), weights(whole.folder)
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in found)


def test_a_damaged_checkpoint_is_noticed(case: Case, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(begun, tmp_path / "out")
    file = tmp_path / "out/training/checkpoints/checkpoint-2/optimizer.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputFileError, match=r"optimizer\.pt is missing or differs"):
        run(case.config(tmp_path / "out", eval_documents=2))


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors"])
def test_a_folder_with_something_else_is_left_alone(case: Case, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(OutputError, match="is not empty and holds no run"):
        run(case.config(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]


def test_checkpoints_hold_no_pickle_but_torchs_own(begun: Path) -> None:
    names = {path.name for path in (begun / "training/checkpoints/checkpoint-2").iterdir()}
    assert names == {"trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json",
                     "run.json", "manifest.json"}  # fmt: skip
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(begun / "training/checkpoints/checkpoint-2" / name, weights_only=True)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, {"model": "a"})
    with checkpoints.writing(2) as folder:
        (folder / "checkpoint-2/weights").write_text("two")
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed: file write failed"),
    ):
        with pytest.raises(OutputError, match=r"the disk is full: .* step 4 .*checkpoint-2 is intact"):
            with checkpoints.writing(4) as folder:
                (folder / "checkpoint-4/weights").write_text("half")
                raise error
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}
    assert checkpoints.last() == tmp_path / "checkpoint-2"
    with pytest.raises(ZeroDivisionError), checkpoints.writing(6):
        raise ZeroDivisionError
    with checkpoints.writing(8) as folder:
        (folder / "checkpoint-8/weights").write_text("eight")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8"}


def test_a_full_disk_at_the_end_leaves_the_checkpoints(tmp_path: Path) -> None:
    from longrope_export.training.output import output_folder

    (tmp_path / "training/checkpoints").mkdir(parents=True)
    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("IoError: No space left on device (os error 28)"),
    ):
        with pytest.raises(OutputError, match=r"the disk is full: .* was not written"):
            with output_folder(tmp_path) as folder:
                (folder / "model.safetensors").write_text("half")
                raise error
        assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
            "training",
            "training/checkpoints",
        ]


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="needs a small disk of its own")
def test_on_a_real_full_disk_the_command_says_so_in_one_line(case: Case, tmp_path: Path) -> None:
    """Room for one checkpoint of about 1.1 MB, and not for the next one beside it."""
    arguments = [
        "finetune", case.model, "--scaling", case.record, "--data", case.texts, "--cache", case.cache, "--steps", "4",
        "--batch", "1", "--save-every", "2", "--eval-documents", "0", "--threads", "1", "--out", tmp_path / "disk/out",
    ]  # fmt: skip
    (tmp_path / "disk").mkdir()
    filled = on_small_disk(tmp_path / "disk", 1_900_000, *arguments)
    assert filled.code == 1, filled.errors
    assert re.fullmatch(
        r"longrope: the disk is full: the checkpoint of step 4 .*\(checkpoint-2 is intact\); free some room .*",
        filled.errors[-1],
    )
    assert not any("Traceback" in line for line in filled.errors)
    assert "out/training/checkpoints/checkpoint-2/manifest.json" in filled.left
    assert not any("partial" in name or "checkpoint-4" in name for name in filled.left)
