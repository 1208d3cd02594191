"""`longrope eval`: every option changes the result, and what does not fit is refused before the model is loaded."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from longrope_export import RopeScaling, load
from longrope_export.cli.evaluate import evaluate
from longrope_export.cli.progress import progress
from longrope_export.errors import InputFileError, LongRopeError, ScalingError, TextTooShortError
from longrope_export.evaluation.documents import encode, evaluation_rows
from longrope_export.evaluation.passkey import evaluate_passkey
from longrope_export.evaluation.perplexity import evaluate_perplexity

WINDOW = 32


@pytest.fixture(scope="module")
def model(tiny_llama: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its tokenizer, as a user's folder."""
    folder = tmp_path_factory.mktemp("eval") / "model"
    shutil.copytree(tiny_llama, folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "book.txt"
    path.write_text("It was the best of times, it was the worst of times; " * 30)
    return path


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scaling = RopeScaling(
        rope_theta=10000.0, rotary_dim=32, original_max_position_embeddings=WINDOW, max_position_embeddings=128,
        long_factor=tuple(np.linspace(1, 4, 16)), short_factor=tuple(np.linspace(1, 2, 16)),
        long_attention_factor=1.1,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("record") / "searched.json"
    path.write_text(scaling.to_json())
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(evaluate, [str(argument) for argument in arguments], catch_exceptions=False)


def run_json(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def only_perplexity(*arguments: object) -> Any:
    return run_json(*arguments, "--tasks", "perplexity")


def perplexities(values: Any) -> dict[int, float]:
    return {entry["length"]: entry["perplexity"] for entry in values["perplexity"]["lengths"]}


def test_json_holds_what_the_library_measures(model: Path, text: Path, tiny_tokenizer: Any) -> None:
    values = only_perplexity(model, "--data", text, "--documents", 2, "--lengths", "1x,64,100", "--threads", 1)
    rows = evaluation_rows([text], tiny_tokenizer, 100, 2)
    expected = evaluate_perplexity(load(model), rows, [WINDOW, 64, 100])
    assert perplexities(values) == pytest.approx(
        {entry.length: entry.perplexity for entry in expected.lengths}, rel=1e-5
    )
    assert values["documents"] == [str(text), f"{text}#2"]
    assert (values["window"], values["lengths"], values["seed"], values["threads"]) == (WINDOW, [32, 64, 100], 0, 1)
    assert values["passkey"] is None
    assert values["comparison"] is None
    assert values["perplexity"]["forward_passes"] == 2
    assert values["seconds"] >= values["perplexity"]["seconds"] > 0
    assert {"longrope-export", "python", "torch", "transformers"} <= set(values["versions"])
    assert len(values["data_sha256"]) == 64


def test_several_data_options_and_folders_are_read_in_order(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b" * 100)
    (tmp_path / "a.txt").write_text("a" * 100)
    values = only_perplexity(model, "--data", text, "--data", tmp_path, "--lengths", 50)
    assert values["documents"] == [str(text), str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]


def test_without_data_the_standard_library_is_measured(model: Path) -> None:
    values = only_perplexity(model, "--lengths", 50, "--documents", 1)
    assert values["documents"] == ["argparse"]
    assert values["data"] == []


def test_without_a_number_five_texts_at_most_are_measured(model: Path, tmp_path: Path) -> None:
    for index in range(7):
        (tmp_path / f"{index}.txt").write_text(str(index) * 60)
    assert len(only_perplexity(model, "--data", tmp_path, "--lengths", 50)["documents"]) == 5
    assert len(only_perplexity(model, "--data", tmp_path, "--lengths", 50, "--documents", 7)["documents"]) == 7


def test_without_lengths_the_window_and_the_longer_one_are_measured(model: Path, text: Path, record: Path) -> None:
    assert only_perplexity(model, "--data", text)["lengths"] == [WINDOW]
    extended = only_perplexity(model, "--data", text, "--scaling", record)
    assert extended["lengths"] == [WINDOW, 128]
    compared = only_perplexity(model, "--data", text, "--methods", "pi", "--to", "2x")
    assert compared["comparison"]["lengths"] == [WINDOW, 64]


def test_scaling_and_switch_choose_the_set(model: Path, text: Path, record: Path) -> None:
    def at(*options: object) -> dict[int, float]:
        return perplexities(only_perplexity(model, "--data", text, "--lengths", "32,100", *options))

    plain, sequence = at(), at("--scaling", record)
    short, long = at("--scaling", record, "--switch", "short"), at("--scaling", record, "--switch", "long")
    assert sequence == pytest.approx({32: short[32], 100: long[100]}, rel=1e-5)
    assert at("--scaling", record, "--switch", "context", "--context", WINDOW) == pytest.approx(short, rel=1e-6)
    assert at("--scaling", record, "--switch", "context", "--context", 33) == pytest.approx(long, rel=1e-6)
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


def test_passkey_options(model: Path, tiny_tokenizer: Any) -> None:
    values = run_json(
        model, "--tasks", "passkey", "--lengths", "450,480", "--trials", 3, "--seed", 7, "--passkey-mode", "forced"
    )
    expected = evaluate_passkey(load(model), tiny_tokenizer, [450, 480], trials=3, seed=7, mode="forced").to_dict()
    assert values["passkey"]["trials"] == expected["trials"]
    assert values["passkey"]["lengths"] == expected["lengths"]
    assert values["passkey"]["lengths"][0]["generated"] is None
    assert values["perplexity"] is None
    both = run_json(model, "--tasks", "passkey", "--lengths", 450, "--trials", 1)["passkey"]
    assert both["lengths"][0]["generated"] is not None
    assert both["trials"][0]["key"] != expected["trials"][0]["key"]


def test_methods_are_compared_on_the_same_documents(model: Path, text: Path, record: Path) -> None:
    methods = f"unchanged,pi,yarn,{record}"
    values = only_perplexity(
        model, "--data", text, "--methods", methods, "--to", "4x", "--lengths", "1x,100", "--documents", 2
    )
    rows = {row["name"]: row for row in values["comparison"]["rows"]}
    assert list(rows) == ["unchanged", "pi", "yarn", "searched"]
    assert rows["pi"]["provenance"]["method"] == "pi"
    alone = perplexities(
        only_perplexity(
            model, "--data", text, "--scaling", record, "--switch", "long", "--lengths", "32,100", "--documents", 2
        )
    )
    assert rows["searched"]["perplexity"] == pytest.approx({"32": alone[32], "100": alone[100]}, rel=1e-5)
    plain = perplexities(only_perplexity(model, "--data", text, "--lengths", "32,100", "--documents", 2))
    assert rows["unchanged"]["perplexity"] == pytest.approx({"32": plain[32], "100": plain[100]}, rel=1e-5)
    eight = only_perplexity(
        model, "--data", text, "--methods", "pi", "--to", "8x", "--lengths", "1x,100", "--documents", 2
    )
    assert eight["comparison"]["rows"][0]["perplexity"]["100"] != pytest.approx(
        rows["pi"]["perplexity"]["100"], rel=1e-4
    )


def test_methods_on_an_extended_model_are_compared_at_its_original_window(
    model: Path, text: Path, record: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "extended"
    shutil.copytree(model, folder)
    load(model, record).save_pretrained(folder)
    comparison = only_perplexity(folder, "--data", text, "--methods", f"unchanged,{record}", "--lengths", "1x,100")[
        "comparison"
    ]
    assert (comparison["window"], comparison["lengths"]) == (WINDOW, [WINDOW, 100])
    short = only_perplexity(model, "--data", text, "--scaling", record, "--switch", "short", "--lengths", WINDOW)
    assert comparison["rows"][1]["short_perplexity"] == pytest.approx(perplexities(short)[WINDOW], rel=1e-5)


def test_passkeys_are_run_for_every_method(model: Path) -> None:
    values = run_json(
        model,
        "--tasks",
        "passkey",
        "--methods",
        "unchanged,pi",
        "--lengths",
        450,
        "--trials",
        2,
        "--passkey-mode",
        "forced",
    )
    assert set(values["passkey"]) == {"unchanged", "pi"}
    assert values["passkey"]["pi"]["lengths"][0]["trials"] == 2


def test_tables_on_stdout_hold_the_numbers(model: Path, text: Path) -> None:
    values = run_json(model, "--data", text, "--lengths", 450, "--trials", 1)
    output = run(model, "--data", text, "--lengths", 450, "--trials", 1).stdout
    assert f"{perplexities(values)[450]:.1f}"[:5] in output
    assert "450" in output
    assert "Passkey" in output
    compared = run(model, "--tasks", "perplexity", "--data", text, "--methods", "pi,ntk", "--lengths", "64").stdout
    assert "short set" in compared
    assert "ntk" in compared


REFUSED: list[tuple[list[str], type[LongRopeError], str]] = [
    (["--lengths", "5000"], TextTooShortError, r"book\.txt has 1,591 tokens .* 5,000 are needed"),
    (["--lengths", "400", "--documents", "9"], TextTooShortError, "3 rows of 400 tokens and 9 documents"),
    (["--data", "missing.txt"], InputFileError, r"missing\.txt does not exist"),
    (["--tasks", "passkey", "--lengths", "100"], TextTooShortError, "100 is too short"),
    (["--methods", "nothing", "--lengths", "64"], ScalingError, "no method 'nothing'"),
    (["--methods", "pi,pi", "--lengths", "64"], ScalingError, "one row twice"),
    (["--switch", "long"], ScalingError, "there is none; give --scaling"),
    (["--scaling", "missing.json"], InputFileError, "missing.json"),
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
    for options in (["--scaling", path], ["--methods", path]):
        with pytest.raises(ScalingError, match=r"rotary_dim 16\).* made for another model"):
            run(model, "--data", text, "--lengths", 64, *options)


@pytest.mark.parametrize(
    "options",
    [
        ["--to", "4x"],
        ["--methods", "pi"],
        ["--context", "64"],
        ["--switch", "context"],
        ["--methods", "pi", "--switch", "long"],
        ["--tasks", "needle"],
        ["--lengths", "64,many"],
        ["--documents", "0"],
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
    assert [entry["trials"] for entry in values["passkey"]["lengths"]] == [2, 2]
    assert 1 < perplexities(values)[256] < 4096


def test_encoding_in_the_cli_adds_nothing_but_bos(model: Path, text: Path, tiny_tokenizer: Any) -> None:
    rows = evaluation_rows([text], tiny_tokenizer, 20)
    assert rows[0].token_ids.tolist() == [1, *encode(tiny_tokenizer, text.read_text())[:19]]
