"""An interrupted evaluation goes on where it was, and nothing else continues its journal."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export.description import describe
from longrope_export.errors import InputFileError, OutputError, StaleStateError
from longrope_export.evaluation import engine as engine_module
from longrope_export.evaluation.journal import EvaluationJournal, journal_path
from longrope_export.evaluation.run import EvaluateOptions, run_evaluation


def options(model: Path, text: Path, **changes: Any) -> EvaluateOptions:
    values: dict[str, Any] = {
        "models": (model,), "data": (text,), "lengths": (32, 48), "methods": ("unchanged", "pi"), "documents": 3,
        "tasks": ("perplexity", "sliding"), "threads": 1, "task_options": {"stride": 20, "text_tokens": 80},
    }  # fmt: skip
    return EvaluateOptions(**{**values, **changes})


def run(chosen: EvaluateOptions, report: Any = None) -> Any:
    keywords = {} if report is None else {"report": report}
    return run_evaluation(chosen, [describe(path) for path in chosen.models], **keywords).values


class Interrupted(BaseException):
    """Ctrl-C at a chosen moment."""


def after(units: int) -> Any:
    @contextmanager
    def report(title: str) -> Any:
        seen: list[int] = []

        def progress(done: int, everything: int) -> None:
            seen.append(done)
            if len(seen) == units:
                raise Interrupted

        yield progress

    return report


def without_times(values: Any) -> Any:
    return {name: value for name, value in values.items() if name not in ("seconds", "command")}


def test_what_was_measured_is_not_measured_again(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = run(options(model, text)), []
    own = engine_module.TransformersEngine.losses

    def losses(self: Any, ids: Any, **keywords: Any) -> Any:
        calls.append(len(ids))
        return own(self, ids, **keywords)

    monkeypatch.setattr(engine_module.TransformersEngine, "losses", losses)
    out = tmp_path / "results"
    with pytest.raises(Interrupted):
        run(options(model, text, out=out), after(11))
    first = len(calls)
    with journal_path(out).open("ab") as journal:
        journal.write(b'{"row": "pi", "unit": "torn')
    assert not (out / "result.json").exists()
    resumed = run(options(model, text, out=out))
    assert without_times(resumed) == without_times(whole)
    assert json.loads((out / "result.json").read_text()) == resumed
    assert (out / "measures.csv").read_text().startswith("task,row")
    once = len(calls)
    run(options(model, text))
    assert first + (once - first) == len(calls) - once
    assert first > 5
    before = len(calls)
    assert without_times(run(options(model, text, out=out))) == without_times(whole)
    assert len(calls) == before


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"lengths": (32, 64)}, "lengths"),
    ({"methods": ("unchanged", "ntk")}, "rows"),
    ({"methods": ("unchanged", "pi"), "target": 256}, "to"),
    ({"documents": 2}, "documents"),
    ({"tasks": ("perplexity",), "task_options": {}}, "tasks"),
    ({"task_options": {"stride": 10, "text_tokens": 80}}, "stride"),
    ({"seed": 1}, "seed"),
    ({"task_options": {"stride": 20, "text_tokens": 100}}, "text_tokens"),
    ({"dtype": "bfloat16"}, "dtype"),
    ({"threads": 2}, "threads"),
    ({"prefill_chunk": 16}, "prefill-chunk"),
    ({"data": ()}, "data"),
]


@pytest.mark.parametrize(
    ("change", "name"), CHANGES, ids=[f"{name} {index}" for index, (_, name) in enumerate(CHANGES)]
)
def test_other_options_are_refused_by_name(
    model: Path, text: Path, started: Path, change: dict[str, Any], name: str
) -> None:
    with pytest.raises(StaleStateError, match=rf"another evaluation: {name}.* is "):
        run(options(model, text, out=started, **change))


@pytest.fixture(scope="module")
def started(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("started")
    with pytest.raises(Interrupted):
        run(options(model, text, out=out), after(1))
    return out


def test_another_model_or_text_is_refused(model: Path, text: Path, started: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(StaleStateError, match="models"):
        run(options(other, text, out=started))
    longer = tmp_path / "book.txt"
    longer.write_text(text.read_text().replace("best", "last"))
    with pytest.raises(StaleStateError, match="documents"):
        run(options(model, longer, out=started))


def test_arrays_come_back_bit_for_bit_and_a_torn_line_is_cut_off(tmp_path: Path) -> None:
    path, values = tmp_path / "journal.jsonl", np.float32([1.1, np.pi, 1e-30])
    with EvaluationJournal(path, {"seed": 0}) as journal:
        journal.append("row", "unit", {"losses": values, "text": "any", "right": None}, 1.0)
    with path.open("ab") as file:
        file.write(b'{"row": "row", "unit": "second", "val')
    with EvaluationJournal(path, {"seed": 0}) as journal:
        assert list(journal.row("row")) == ["unit"]
        found = journal.row("row")["unit"]
        assert found["losses"].tobytes() == values.tobytes()
        assert (found["text"], found["right"]) == ("any", None)
        journal.append("row", "third", {"value": 3}, 1.0)
        with pytest.raises(OutputError, match="another evaluation is writing it"):
            EvaluationJournal(path, {"seed": 0})
    with EvaluationJournal(path, {"seed": 0}) as journal:
        assert list(journal.row("row")) == ["unit", "third"]


@pytest.mark.parametrize("content", [b"[]\n", b'{"format": "other"}\n', b"nothing\n", b'{"format": 1}\n'])
def test_a_file_that_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match="line 1 is not valid"):
        EvaluationJournal(path, {"seed": 0})
    assert path.read_bytes() == content
