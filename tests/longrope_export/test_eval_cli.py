"""`longrope eval`: every option changes the result, and what does not fit is refused before the model is loaded."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from longrope_export import RopeScaling, load
from longrope_export.cli.evaluate import evaluate
from longrope_export.cli.progress import progress
from longrope_export.errors import InputFileError, LongRopeError, ScalingError, TextTooShortError, UnsupportedModelError
from longrope_export.evaluation.documents import encode, evaluation_rows
from longrope_export.evaluation.perplexity import evaluate_perplexity

WINDOW = 32


def run(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments], catch_exceptions=False)


def run_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def only_perplexity(*arguments: object) -> Any:
    return run_json(*arguments, "--tasks", "perplexity")


def perplexities(values: Any, row: str = "unchanged") -> dict[int, float]:
    return {entry["length"]: entry["perplexity"] for entry in values["tasks"]["perplexity"]["rows"][row]["lengths"]}


def names(values: Any) -> list[str]:
    return [document["name"] for document in values["data"]["documents"]]


def test_json_holds_what_the_library_measures(model: Path, text: Path, tiny_tokenizer: Any) -> None:
    values = only_perplexity(model, "--data", text, "--documents", 2, "--lengths", "1x,64,100", "--threads", 1)
    rows = evaluation_rows([text], tiny_tokenizer, 100, 2)
    expected = evaluate_perplexity(load(model), rows, [WINDOW, 64, 100])
    assert perplexities(values) == pytest.approx(
        {entry.length: entry.perplexity for entry in expected.lengths}, rel=1e-5
    )
    assert names(values) == [str(text), f"{text}#2"]
    assert (values["window"], values["lengths"], values["seed"], values["threads"]) == (WINDOW, [32, 64, 100], 0, 1)
    assert list(values["tasks"]) == ["perplexity"]
    assert (values["format"], values["reference"]) == ("longrope-eval/1", "unchanged")
    assert values["models"][0]["name"] == "model"
    assert values["seconds"] > 0
    assert {"longrope-export", "python", "torch", "transformers"} <= set(values["versions"])
    assert len(values["data"]["sha256"]) == len(values["models"][0]["fingerprint"]) == 64


def test_several_data_options_and_folders_are_read_in_order(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 100)
    (tmp_path / "a.txt").write_text("a" * 100)
    values = only_perplexity(model, "--data", text, "--data", tmp_path, "--lengths", 50)
    assert names(values) == [str(text), str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_without_data_the_standard_library_is_measured(model: Path) -> None:
    values = only_perplexity(model, "--lengths", 50, "--documents", 1)
    assert names(values) == ["argparse"]
    assert values["data"]["paths"] == []


def test_without_a_number_five_texts_at_most_are_measured(model: Path, tmp_path: Path) -> None:
    for index in range(7):
        (tmp_path / f"{index}.txt").write_text(str(index) * 60)
    assert len(names(only_perplexity(model, "--data", tmp_path, "--lengths", 50))) == 5
    assert len(names(only_perplexity(model, "--data", tmp_path, "--lengths", 50, "--documents", 7))) == 7


def test_without_lengths_the_window_and_the_longer_one_are_measured(model: Path, text: Path, record: Path) -> None:
    assert only_perplexity(model, "--data", text)["lengths"] == [WINDOW]
    extended = only_perplexity(model, "--data", text, "--scaling", record)
    assert extended["lengths"] == [WINDOW, 128]
    assert only_perplexity(model, "--data", text, "--methods", "pi", "--to", "2x")["lengths"] == [WINDOW, 64]


def test_scaling_and_switch_choose_the_set(model: Path, text: Path, record: Path) -> None:
    def at(*options: object) -> dict[int, float]:
        found = only_perplexity(
            model, "--data", text, "--lengths", "32,100", "--scaling", record, "--methods", "", *options
        )
        return perplexities(found, "searched")

    plain, sequence = perplexities(only_perplexity(model, "--data", text, "--lengths", "32,100")), at()
    short, long = at("--switch", "short"), at("--switch", "long")
    assert sequence == pytest.approx({32: short[32], 100: long[100]}, rel=1e-5)
    assert at("--switch", "context", "--context", WINDOW) == pytest.approx(short, rel=1e-6)
    assert at("--switch", "context", "--context", 33) == pytest.approx(long, rel=1e-6)
    numbers = [plain[100], short[100], long[100]]
    assert all(abs(math.log(a / b)) > 1e-4 for a, b in ((numbers[0], numbers[1]), (numbers[1], numbers[2])))


def test_dtype_changes_the_weights(model: Path, text: Path) -> None:
    exact = perplexities(only_perplexity(model, "--data", text, "--lengths", 100))
    rounded = perplexities(only_perplexity(model, "--data", text, "--lengths", 100, "--dtype", "bfloat16"))
    assert 1e-6 < abs(math.log(exact[100] / rounded[100])) < 0.1


def test_threads_are_set(model: Path, text: Path) -> None:
    before = torch.get_num_threads()
    try:
        only_perplexity(model, "--data", text, "--lengths", 50, "--threads", before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_rows_of_methods_and_records_are_compared_on_the_same_documents(
    model: Path, text: Path, record: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text(record.read_text().replace("1.1", "1.3"))
    common = ("--data", text, "--lengths", "1x,100", "--documents", 2)
    values = only_perplexity(
        model, *common, "--methods", "unchanged,pi,yarn", "--to", "4x", "--scaling", record, "--scaling", other
    )
    assert [row["name"] for row in values["rows"]] == ["unchanged", "pi", "yarn", "searched", "other"]
    assert values["rows"][1]["scaling"]["provenance"]["method"] == "pi"
    assert values["rows"][1]["scaling"]["max_position_embeddings"] == 128
    plain = perplexities(only_perplexity(model, *common))
    assert perplexities(values) == pytest.approx(plain, rel=1e-5)
    assert len({perplexities(values, row["name"])[100] for row in values["rows"]}) == 5
    eight = only_perplexity(model, *common, "--methods", "unchanged,pi", "--to", "8x")
    assert perplexities(eight, "pi")[100] != pytest.approx(perplexities(values, "pi")[100], rel=1e-4)


def test_a_model_that_carries_a_record_is_compared_with_itself_without_it(
    model: Path, text: Path, record: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "extended"
    shutil.copytree(model, folder)
    load(model, record).save_pretrained(folder)
    values = run_json(
        folder, "--data", text, "--methods", "plain,unchanged", "--lengths", "1x,100", "--tasks", "perplexity,retention"
    )
    assert (values["window"], values["reference"]) == (WINDOW, "plain")
    own = only_perplexity(model, "--data", text, "--scaling", record, "--lengths", "1x,100")
    assert perplexities(values) == pytest.approx(perplexities(own, "searched"), rel=1e-5)
    assert perplexities(values, "plain") == pytest.approx(perplexities(own), rel=1e-5)
    assert set(values["tasks"]["retention"]["rows"]) == {"unchanged"}


def test_several_models_are_compared_with_the_first(
    model: Path, text: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    changed = load(model)
    with torch.no_grad():
        changed.lm_head.weight.mul_(1.5)
    changed.save_pretrained(tuned)
    tiny_tokenizer.save_pretrained(tuned)
    values = only_perplexity(
        model, tuned, "--data", text, "--lengths", 64, "--documents", 2, "--methods", "unchanged,pi"
    )
    assert [row["name"] for row in values["rows"]] == ["model", "model: pi", "tuned", "tuned: pi"]
    assert [entry["name"] for entry in values["models"]] == ["model", "tuned"]
    alone = only_perplexity(tuned, "--data", text, "--lengths", 64, "--documents", 2)
    assert perplexities(values, "tuned") == pytest.approx(perplexities(alone), rel=1e-5)
    difference = values["tasks"]["perplexity"]["rows"]["tuned"]["lengths"][0]["difference"]
    assert difference["ratio"] == pytest.approx(perplexities(values, "tuned")[64] / perplexities(values, "model")[64])
    tiny_tokenizer.__class__.from_pretrained(tuned, bos_token="<unk>").save_pretrained(tuned)
    for tasks in ("perplexity", "passkey"):  # the latter reads no text in which it would show
        with pytest.raises(UnsupportedModelError, match="splits the texts into other tokens"):
            run(model, tuned, "--data", text, "--lengths", 64, "--tasks", tasks)


def test_without_tasks_retention_joins_where_there_is_something_to_compare(model: Path, text: Path) -> None:
    few = ("--data", text, "--lengths", 450, "--trials", 1, "--documents", 1)
    alone, compared = (
        run_json(model, *few),
        run_json(model, *few, "--methods", "unchanged,pi", "--passkey-mode", "forced"),
    )
    assert list(alone["tasks"]) == ["perplexity", "passkey"]
    assert list(compared["tasks"]) == ["perplexity", "retention", "passkey"]
    assert set(compared["tasks"]["passkey"]["rows"]) == {"unchanged", "pi"}


def test_tables_and_csv_on_stdout_hold_the_numbers(model: Path, text: Path) -> None:
    few = ("--data", text, "--lengths", 64, "--tasks", "perplexity", "--methods", "unchanged,pi")
    values, table, lines = run_json(model, *few), run(model, *few), run(model, *few, "--csv").stdout.splitlines()
    shown = f"{perplexities(values, 'pi')[64]:.1f}"
    assert shown in table.stdout
    assert "pi" in table.stdout
    assert lines[0].startswith("task,row,metric,value")
    found = {(line["metric"], line["row"], line["length"]): line["value"] for line in csv.DictReader(lines)}
    assert float(found["perplexity", "pi", "64"]) == pytest.approx(perplexities(values, "pi")[64], rel=1e-6)
    assert "note: unchanged is made for 32 tokens and was measured at 64" in table.stderr
    assert "pi is made" not in table.stderr


def test_the_position_offset_moves_the_positions(model: Path, text: Path, record: Path, tmp_path: Path) -> None:
    start = tmp_path / "start.json"
    start.write_text(json.dumps({**json.loads(record.read_text()), "long_start_tokens": 20}))
    common = ("--data", text, "--lengths", 64, "--documents", 1, "--scaling", start)
    near, far = only_perplexity(model, *common), only_perplexity(model, *common, "--position-offset", "1020k")
    assert far["position_offset"] == far["tasks"]["perplexity"]["offset"] == 1_044_480
    assert perplexities(far) == pytest.approx(perplexities(near), rel=1e-3), "RoPE is relative"
    assert perplexities(far, "start")[64] != pytest.approx(perplexities(near, "start")[64], rel=1e-4)
    with pytest.raises(LongRopeError, match="--position-offset is for the task perplexity; leave out passkey"):
        run(model, *common, "--position-offset", "8", "--tasks", "perplexity,passkey")


def test_the_prefill_chunk_reaches_the_engine(model: Path, text: Path) -> None:
    common = ("--data", text, "--lengths", 100, "--documents", 1)
    whole, chunked = only_perplexity(model, *common), only_perplexity(model, *common, "--prefill-chunk", 16)
    assert chunked["prefill_chunk"] == 16
    assert perplexities(chunked) == pytest.approx(perplexities(whole), rel=1e-5)
    assert perplexities(chunked) != perplexities(whole), "the same bits: nothing was chunked"


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longrope_export.cli import evaluate as module

    common = ("--data", text, "--lengths", 64, "--documents", 3, "--tasks", "perplexity")

    @contextmanager
    def interrupted(title: str) -> Iterator[Any]:
        def report(done: int, everything: int) -> None:
            raise KeyboardInterrupt

        yield report

    with monkeypatch.context() as patched:
        patched.setattr(module, "progress", interrupted)
        patched.setattr(module.sys, "argv", ["longrope", "eval", "a model"])
        stopped = run(model, *common, "--out", tmp_path / "results")
        assert stopped.exit_code == 130
        assert "To continue:\n  longrope eval 'a model'" in stopped.stderr
        assert run(model, *common).stderr.endswith("nothing was kept\n")
    going_on = run(model, *common, "--out", tmp_path / "results")
    assert f"{tmp_path / 'results'}: going on, 1 of 3 parts are there" in going_on.stderr
    assert json.loads((tmp_path / "results" / "result.json").read_text())["command"]


REFUSED: list[tuple[list[str], type[LongRopeError], str]] = [
    (["--lengths", "5000"], TextTooShortError, r"book\.txt has 1,591 tokens .* 5,000 are needed"),
    (["--lengths", "400", "--documents", "9"], TextTooShortError, "3 rows of 400 tokens and 9 documents"),
    (["--data", "missing.txt"], InputFileError, r"missing\.txt does not exist"),
    (["--tasks", "passkey", "--lengths", "100"], TextTooShortError, "100 is too short"),
    (["--methods", "nothing", "--lengths", "64"], ScalingError, "no method 'nothing'"),
    (["--methods", "pi,pi", "--lengths", "64"], ScalingError, "two rows would be called 'pi'"),
    (["--switch", "long"], ScalingError, "there is none; give --scaling"),
    (["--scaling", "missing.json"], InputFileError, "missing.json"),
    (["--stride", "8"], LongRopeError, "--stride belongs to none of the tasks perplexity"),
    (["--runtime", "llamacpp"], UnsupportedModelError, "is no GGUF file"),
    (["--runtime", "llamacpp", "--methods", "pi"], UnsupportedModelError, "write the factors into a copy"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED, ids=[" ".join(entry[0]) for entry in REFUSED])
def test_what_does_not_fit_is_refused_before_the_model_is_loaded(
    model: Path, text: Path, tmp_path: Path, options: list[str], error: type[LongRopeError], message: str
) -> None:
    """The folder has no weights: loading would fail with another message."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"{}      ")
    tasks = [] if "--tasks" in options else ["--tasks", "perplexity"]
    with pytest.raises(error, match=message):
        run(folder, "--data", text, *tasks, *options)


def test_a_record_of_another_model_is_refused_before_loading(model: Path, text: Path, tmp_path: Path) -> None:
    other = RopeScaling(
        rope_theta=10000.0, rotary_dim=16, original_max_position_embeddings=WINDOW, max_position_embeddings=64,
        long_factor=(2.0,) * 8,
    )  # fmt: skip
    path = tmp_path / "other.json"
    path.write_text(other.to_json())
    for options in (["--scaling", path], ["--methods", f"unchanged,{path}"]):
        with pytest.raises(ScalingError, match=r"rotary_dim 16\).* made for another model"):
            run(model, "--data", text, "--lengths", 64, *options)


@pytest.mark.parametrize(
    "options",
    [
        ["--context", "64"],
        ["--switch", "context"],
        ["--methods", ""],
        ["--tasks", "needles"],
        ["--lengths", "64,many"],
        ["--documents", "0"],
        ["--json", "--csv"],
    ],
    ids=" ".join,
)
def test_options_that_contradict_each_other_are_usage_errors(model: Path, text: Path, options: list[str]) -> None:
    assert run(model, "--data", text, *options).exit_code == 2


def test_progress_is_plain_lines_with_the_time_left_when_not_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from longrope_export.cli import progress as module

    clock = iter([100.0, 105.0, 111.0, 115.0, 130.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    with progress("perplexity", out) as report:
        for done in (10, 22, 30, 60):
            report(done, 100)
    assert out.getvalue() == "perplexity: 22%, 39 s left\nperplexity: 60%, 20 s left\n"


def test_the_demo_model_in_the_package_is_measured_with_its_own_tokenizer() -> None:
    import longrope_export

    folder = Path(longrope_export.__file__).parent / "demo_model"
    values = run_json(folder, "--lengths", "1x,2x", "--documents", 1, "--trials", 2, "--passkey-mode", "forced")
    assert values["window"] == 256
    assert len(values["tasks"]["passkey"]["rows"]["unchanged"]["trials"]) == 4
    assert 1 < perplexities(values)[256] < 4096


def test_encoding_in_the_cli_adds_nothing_but_bos(model: Path, text: Path, tiny_tokenizer: Any) -> None:
    rows = evaluation_rows([text], tiny_tokenizer, 20)
    assert rows[0].token_ids.tolist() == [1, *encode(tiny_tokenizer, text.read_text())[:19]]
