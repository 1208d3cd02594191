"""`longrope finetune`: every option reaches the configuration, and the command from start to end."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from children import start, wait
from click.testing import CliRunner
from finetune_case import Case

from longrope_export.cli.finetune import finetune, finetune_config
from longrope_export.cli.main import main
from longrope_export.training.config import FinetuneConfig

PLAIN = ["model", "--data", "a.txt", "--data", "b", "--out", "out"]
OPTIONS: list[tuple[list[str], str, Any]] = [
    (["--scaling", "x.json"], "scaling", Path("x.json")),
    (["--positions", "pose"], "positions", "pose"),
    (["--length", "2x"], "length", "2x"),
    (["--chunks", "3"], "chunks", 3),
    (["--text-offsets"], "text_offsets", True),
    (["--alpha", "0.5"], "alpha", 0.5),
    (["--long-share", "0.5"], "long_share", 0.5),
    (["--packing", "first-fit"], "packing", "first-fit"),
    (["--cut-longer"], "cut_longer", True),
    (["--field", "story"], "field", "story"),
    (["--bos", "never"], "bos", "never"),
    (["--eos", "always"], "eos", "always"),
    (["--cache", "tokens"], "cache", Path("tokens")),
    (["--attention", "s2"], "attention", "s2"),
    (["--group-share", "0.5"], "group_share", 0.5),
    (["--shifts", "flow"], "shifts", "flow"),
    (["--train", "lora-plus"], "train", "lora-plus"),
    (["--lora-rank", "4"], "lora_rank", 4),
    (["--lora-alpha", "8"], "lora_alpha", 8.0),
    (["--lora-dropout", "0.1"], "lora_dropout", 0.1),
    (["--lora-targets", "q_proj, v_proj"], "lora_targets", ("q_proj", "v_proj")),
    (["--steps", "7"], "steps", 7),
    (["--batch", "8"], "batch", 8),
    (["--micro-batch", "2"], "micro_batch", 2),
    (["--learning-rate", "1e-4"], "learning_rate", 1e-4),
    (["--schedule", "cosine"], "schedule", "cosine"),
    (["--warmup", "0"], "warmup", 0),
    (["--weight-decay", "0.1"], "weight_decay", 0.1),
    (["--clip", "0"], "clip", 0.0),
    (["--optimizer", "adafactor"], "optimizer", "adafactor"),
    (["--seed", "3"], "seed", 3),
    (["--dtype", "bfloat16"], "dtype", "bfloat16"),
    (["--no-gradient-checkpointing"], "gradient_checkpointing", False),
    (["--save-every", "5"], "save_every", 5),
    (["--eval-data", "e", "--eval-data", "f"], "eval_data", (Path("e"), Path("f"))),
    (["--eval-documents", "2"], "eval_documents", 2),
    (["--eval-every", "5"], "eval_every", 5),
    (["--log-every", "5"], "log_every", 5),
    (["--report-to", "tensorboard,wandb"], "report_to", ("tensorboard", "wandb")),
    (["--threads", "2"], "threads", 2),
]


def parsed(arguments: list[str]) -> FinetuneConfig:
    options = dict(finetune.make_context("finetune", list(arguments)).params)
    assert options.pop("as_json") is False
    assert options.pop("dry_run") is False
    return finetune_config(options)


def test_without_options_the_configuration_is_the_default_one() -> None:
    assert parsed(PLAIN) == FinetuneConfig(model=Path("model"), data=(Path("a.txt"), Path("b")), out=Path("out"))


@pytest.mark.parametrize(("arguments", "name", "value"), OPTIONS, ids=[arguments[0] for arguments, _, _ in OPTIONS])
def test_every_option_reaches_the_configuration(arguments: list[str], name: str, value: Any) -> None:
    assert getattr(parsed([*PLAIN, *arguments]), name) == value != getattr(parsed(PLAIN), name)


def test_the_table_above_holds_every_option() -> None:
    options = {name for each in finetune.params if isinstance(each, click.Option) for name in each.opts}
    tested = {name.replace("--no-gradient", "--gradient") for arguments, _, _ in OPTIONS for name in arguments
              if name.startswith("--")}  # fmt: skip
    assert options == tested | {"--data", "--out", "--json", "--dry-run"}


def test_the_help_states_the_defaults_that_the_code_has() -> None:
    default, checked = parsed(PLAIN), set()
    for option in finetune.params:
        match = re.search(r"\[default: ([^,;\]]+)", getattr(option, "help", None) or "")
        value = getattr(default, option.name or "", None)
        if match and value not in (None, ()):
            shown = {True: "yes", False: "no"}.get(value, value) if isinstance(value, bool) else value
            number = isinstance(value, int | float) and not isinstance(value, bool)
            said = match[1].split(":")[0]
            assert float(said) == value if number else said == shown, option.name
            checked.add(option.name)
    assert len(checked) >= 25


def test_the_papers_defaults() -> None:
    config = parsed(PLAIN)
    assert (config.rate, config.weight_decay, config.warmup, config.clip) == (2e-5, 0.0, 20, 1.0)
    assert parsed([*PLAIN, "--train", "lora"]).rate == 2e-4
    assert parsed([*PLAIN, "--positions", "mixed"]).share_of_long_rows == 0.6


def test_the_time_left_counts_from_where_a_run_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from longrope_export.cli import progress as module

    clock = iter([100.0, 150.0, 160.0, 180.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with module.progress("fine-tuning", out) as report:
        report(0, 1, "loading the model")
        report(80, 100, "")
        report(84, 100, "step 84, loss 2.0000")
    assert out.getvalue() == "fine-tuning: 84%, step 84, loss 2.0000, 80 s left\n"


def arguments(case: Case, out: Path, *more: str) -> list[str]:
    return [
        str(case.model), "--scaling", str(case.record), "--data", str(case.texts), "--cache", str(case.cache), "--out",
        str(out), "--steps", "2", "--batch", "2", "--warmup", "0", "--threads", "1", *more,
    ]  # fmt: skip


def test_the_command_writes_a_folder_and_says_what_came_out(case: Case, tmp_path: Path) -> None:
    more = ["--positions", "pose", "--train", "lora", "--report-to", "tensorboard", "--eval-documents", "2"]
    result = CliRunner().invoke(finetune, arguments(case, tmp_path / "out", *more))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("2 steps, 128 tokens, last loss ")
    assert [line.split()[:4] for line in lines[1:3]] == [["perplexity", "32", "short", lines[1].split()[3]],
                                                        ["perplexity", "128", "long", lines[2].split()[3]]]  # fmt: skip
    assert lines[3] == f"written: {tmp_path / 'out'}"
    assert "step 0: perplexity 32 short" in result.stderr
    assert list((tmp_path / "out/runs").rglob("events.out.tfevents*"))
    assert (tmp_path / "out/adapter/adapter_config.json").is_file()
    again = CliRunner().invoke(finetune, arguments(case, tmp_path / "out", *more, "--json"))
    assert json.loads(again.stdout)["config"]["positions"] == "pose"


def test_a_dry_run_measures_and_writes_nothing(case: Case, tmp_path: Path) -> None:
    more = ["--dry-run", "--steps", "500", "--batch", "8", "--micro-batch", "2"]
    shown = CliRunner().invoke(finetune, arguments(case, tmp_path / "out", *more))
    assert shown.exit_code == 0, shown.output
    assert "500 steps of 8 rows: 1,024 tokens a step, 512,000 in all" in shown.stdout
    found = json.loads(CliRunner().invoke(finetune, arguments(case, tmp_path / "out", *more, "--json")).stdout)
    assert (found["rows"], found["row_tokens"], found["tokens_per_step"]) == (4000, 128, 1024)
    assert found["trained_parameters"] == found["parameters"] > 80_000
    assert found["state_bytes"] == 16 * found["parameters"]
    assert found["seconds"] == pytest.approx(500 * found["seconds_per_step"])
    assert found["peak_bytes"] > found["state_bytes"]
    assert not (tmp_path / "out").exists()


def test_ctrl_c_prints_the_command_to_continue(case: Case, tmp_path: Path) -> None:
    import os

    from longrope_export.training import reporting

    def work() -> None:
        def shown(self: Any, args: Any, state: Any, control: Any, **more: Any) -> None:
            os.kill(os.getpid(), signal.SIGINT)

        reporting.LogCallback.on_step_begin = shown  # type: ignore[method-assign]
        sys.argv = ["longrope", "finetune", *arguments(case, tmp_path / "out")]
        main(sys.argv[1:])

    assert wait(start(work, tmp_path / "output")) == 130
    output = (tmp_path / "output").read_text()
    assert "stopped after step 1; a checkpoint is saved. To continue:\n  longrope finetune " in output
    assert "Traceback" not in output
    assert (tmp_path / "out/training/checkpoints/checkpoint-1/manifest.json").is_file()
