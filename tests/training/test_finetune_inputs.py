"""Wrong input is refused in one line, before weights or texts are read; a sibling's factors are allowed with a remark."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from finetune_case import TARGET, WINDOW, Case, record, write_texts

from longrope_export.errors import (
    InputFileError,
    LongRopeError,
    MissingDependencyError,
    ScalingError,
    TextTooShortError,
)
from longrope_export.fingerprint import fingerprint
from longrope_export.training.config import FinetuneConfig
from longrope_export.training.corpus import read_corpus
from longrope_export.training.finetune import run
from longrope_export.training.inputs import check_inputs


def with_record(case: Case, folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "changed.json"
    path.write_text(record(**changes).to_json())
    return {"scaling": path}


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test: everything here must be found before."""
    from longrope_export.training.model import TrainedModel

    def load(*arguments: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(TrainedModel, "load", load)


WRONG_RECORDS = [
    ({"rope_theta": 500000.0}, "rope_theta 500000, but the model has 10000"),
    ({"rotary_dim": 16, "long_factor": (1.0,) * 8, "short_factor": (1.0,) * 8}, "the model rotates 32 values"),
    ({"original_max_position_embeddings": 64}, "switches at 64 tokens .* the model's window is 32"),
    (
        {"provenance": {"composed_with": {"factors": [2.0] * 16}}},
        "another base scaling .* divided by 2 there and is by 1",
    ),
    ({"provenance": {"short": "original"}}, "another base scaling .*pair 1 was divided by 1.01"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_RECORDS, ids=["theta", "rotary_dim", "window", "base", "short"])
def test_another_models_record_is_refused(case: Case, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ScalingError, match=message):
        run(case.config(tmp_path / "out", **with_record(case, tmp_path, **changes)))
    assert not (tmp_path / "out").exists()


def test_a_record_on_the_models_own_base_scaling_is_taken(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.model, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    origin = {"composed_with": {"factors": [2.0] * 16}}
    changes = with_record(case, tmp_path, provenance=origin)
    assert check_inputs(case.config(tmp_path / "out", model=tmp_path / "model", **changes)).target == TARGET
    with pytest.raises(ScalingError, match="divided by 1 there and is by 2"):
        changes = with_record(case, tmp_path, provenance={"short": "original"}, short_factor=(1.0,) * 16)
        check_inputs(case.config(tmp_path / "out", model=tmp_path / "model", **changes))


def test_a_tuned_model_is_trained_again_with_its_own_or_with_further_factors(case: Case, tmp_path: Path) -> None:
    """A model that carries a record, its short factors not ones: its record, and one of a second search on top of it."""
    from longrope_export import load as load_model

    load_model(case.model, record()).save_pretrained(tmp_path / "model")
    model = {"model": tmp_path / "model"}
    assert check_inputs(case.config(tmp_path / "out", scaling=None, **model)).scaling == record()
    longer = {"max_position_embeddings": 256, "provenance": {"short": "original"}}
    found = check_inputs(case.config(tmp_path / "out", **model, **with_record(case, tmp_path, **longer)))
    assert (found.window, found.target, found.positions.tokens) == (WINDOW, 256, 256)
    changes = with_record(case, tmp_path, **longer, short_factor=(1.0,) * 16)
    with pytest.raises(ScalingError, match="another base scaling"):
        check_inputs(case.config(tmp_path / "out", **model, **changes))


def test_a_siblings_factors_are_allowed_with_a_remark(case: Case, tmp_path: Path) -> None:
    def remarks(model: str) -> tuple[str, ...]:
        changes = with_record(case, tmp_path, provenance={"method": "search", "model": model})
        return check_inputs(case.config(tmp_path / "out", **changes)).remarks

    assert remarks(fingerprint(case.model)) == ()
    assert "searched on another model of the same shape" in remarks("0" * 64)[0]
    assert remarks("SmolLM2") == ()  # a name, no fingerprint


def test_a_model_without_a_record_needs_one(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match=r"carries no longrope factors; give them with --scaling"):
        run(case.config(tmp_path / "out", scaling=None))


REFUSED = [
    ({"optimizer": "adamx"}, LongRopeError, r"--optimizer 'adamx' is not known; choose one of .*adamw_torch"),
    ({"optimizer": "adamw_bnb_8bit"}, MissingDependencyError, "--optimizer adamw_bnb_8bit cannot be used here"),
    ({"report_to": ("paper",)}, LongRopeError, "--report-to 'paper' is not known"),
    ({"train": "lora", "lora_targets": ("query",)}, LongRopeError, "has no linear layer query .*q_proj"),
    (
        {"attention": "s2", "group_share": 0.3},
        LongRopeError,
        r"a group of 38\.40 tokens, which does not divide the row",
    ),
    ({"attention": "scca", "length": "100"}, LongRopeError, r""),
    ({"length": "256"}, ScalingError, "--length is 256 tokens, and the scaling reaches 128"),
    ({"positions": "mixed", "length": "32"}, ScalingError, "no document with long factors fits into"),
    ({"positions": "pose", "chunks": 40}, LongRopeError, "40 chunks do not fit into 32 tokens"),
    ({"alpha": 0.3, "positions": "segments"}, LongRopeError, "one over a whole number"),
    ({"batch": 5}, LongRopeError, "--micro-batch 2 does not divide --batch 5"),
    ({"steps": 0}, LongRopeError, "--steps is 0; it must be a whole number of at least 1"),
    ({"learning_rate": 0.0}, LongRopeError, "--learning-rate is 0.0; it must be a number above 0"),
    ({"clip": float("nan")}, LongRopeError, "--clip is nan"),
    ({"schedule": "step"}, LongRopeError, "--schedule is 'step'; choose constant, linear, cosine"),
    ({"length": "long"}, LongRopeError, "--length is 'long'; write 16384, 32k or 2x"),
    ({"data": ()}, LongRopeError, "--data is missing"),
    ({"data": (Path("nowhere.txt"),)}, InputFileError, "nowhere.txt does not exist"),
    ({"eval_documents": 500}, TextTooShortError, "500 documents were asked to be held out"),
]


@pytest.mark.parametrize(
    ("changes", "kind", "message"), REFUSED, ids=[str(list(each.items())) for each, _, _ in REFUSED]
)
def test_wrong_options_are_refused_by_name(
    case: Case, tmp_path: Path, changes: dict[str, Any], kind: type[Exception], message: str
) -> None:
    if changes.get("length") == "100":
        assert check_inputs(case.config(tmp_path, **changes)).positions.tokens == 100  # a group of 25
        return
    with pytest.raises(kind, match=message):
        run(case.config(tmp_path / "out", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"positions": "mixed"}, "attends over whole rows"), ({"attention": "s2"}, "attends over whole rows"),
     ({"long_share": 0.5}, "attends over whole rows"), ({"length": "100"}, "rows of a multiple of 8 tokens")],
)  # fmt: skip
def test_what_context_parallelism_cannot_express_is_refused(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    assert check_inputs(case.config(tmp_path)).positions.tokens == TARGET
    with pytest.raises(LongRopeError, match=message):
        check_inputs(case.config(tmp_path, **changes))


def test_data_shorter_than_a_row_is_refused(case: Case, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 0, long=0, short=5)
    with pytest.raises(TextTooShortError, match=f"{TARGET}"):
        run(case.config(tmp_path / "out", data=(texts,)))


def test_eval_data_shorter_than_the_window_is_refused(case: Case, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts", 0, long=0, short=5)
    with pytest.raises(TextTooShortError, match=f"--eval-data has no document of {WINDOW} tokens"):
        run(case.config(tmp_path / "out", eval_data=(texts,)))


@pytest.mark.parametrize("inside", ["model", "texts"])
def test_an_output_inside_what_is_read_is_refused(case: Case, inside: str) -> None:
    source = getattr(case, inside)
    with pytest.raises(InputFileError, match="which the run reads"):
        run(case.config(source / "out"))


def test_a_tokenizer_of_another_model_is_refused(case: Case, tmp_path: Path) -> None:
    shutil.copytree(case.model, tmp_path / "model")
    tokenizer = json.loads((tmp_path / "model/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["é"] = 120
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(LongRopeError, match="knows 121 tokens and the model 97"):
        run(case.config(tmp_path / "out", model=tmp_path / "model"))


def test_the_configuration_is_a_record_of_plain_values(case: Case, tmp_path: Path) -> None:
    config = case.config(tmp_path)
    assert json.loads(json.dumps(config.to_dict()))["data"] == [str(case.texts)]
    assert set(config.deciding()) == {
        f"--{name.replace('_', '-')}" for name in FinetuneConfig.__dataclass_fields__
    } - {"--model", "--data", "--out", "--scaling", "--cache", "--micro-batch", "--gradient-checkpointing",
         "--save-every", "--eval-data", "--eval-every", "--log-every", "--report-to", "--threads"}  # fmt: skip


def test_documents_that_no_row_takes_are_remarked(case: Case, tmp_path: Path) -> None:
    def remarks(name: str, **changes: Any) -> tuple[str, ...]:
        config = case.config(tmp_path / name, data=(tmp_path / "texts",), eval_documents=0, cache=None, **changes)
        return read_corpus(config, check_inputs(config), tmp_path / name, lambda done, total, what: None).remarks

    write_texts(tmp_path / "texts", 0)
    with (tmp_path / "texts/texts.jsonl").open("a") as file:
        file.write(json.dumps({"text": "x" * 58}) + "\n")
    mixed = "1 of the documents (59 tokens) are not trained on: long rows take documents of 128 tokens or more; those of up to 32 "
    assert [each for each in remarks("mixed", positions="mixed") if each.startswith(mixed)]
    assert not remarks("cut", positions="mixed", cut_longer=True)
    assert [each for each in remarks("full") if each.startswith("97 of the documents")]
