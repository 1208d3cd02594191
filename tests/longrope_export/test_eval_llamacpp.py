"""`--runtime llamacpp`: losses and choices of a real llama.cpp against the same file in transformers, on both sides."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.demo import demo_model_path
from longrope_export.description import describe
from longrope_export.errors import LongRopeError, ScalingError
from longrope_export.evaluation.llamacpp_engine import LlamaCppEngine, context_for
from longrope_export.evaluation.rows import ModelRow
from longrope_export.evaluation.run import EvaluateOptions, run_evaluation

WINDOW = 256
# The cache is F16 there, and sums are in another order; the factors move these losses by tenths of nats.
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo model as a GGUF, and the same file with two sets of factors."""
    folder = tmp_path_factory.mktemp("llamacpp")
    plain = folder / "plain.gguf"
    convert_to_gguf(demo_model_path(), plain, dtype="f32")
    model = describe(plain)
    pairs = model.rotary_dim // 2
    record = RopeScaling(
        rope_theta=model.rope_theta, rotary_dim=model.rotary_dim, original_max_position_embeddings=WINDOW,
        max_position_embeddings=1024, long_factor=tuple(np.linspace(2, 8, pairs)),
        short_factor=tuple(np.linspace(1, 1.5, pairs)),
    )  # fmt: skip
    patch_gguf(plain, folder / "longer.gguf", record)
    return plain, folder / "longer.gguf"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(Path(argparse.__file__).read_text()[:8000])
    return path


def evaluate(files: tuple[Path, ...], text: Path, runtime: str) -> Any:
    options = EvaluateOptions(
        models=files, data=(text,), lengths=(WINDOW, 400), documents=2, runtime=runtime, threads=1,
        tasks=("perplexity", "retention"),
    )  # fmt: skip
    return run_evaluation(options, [describe(path) for path in files]).values["tasks"]


def test_llama_cpp_s_own_perplexity_is_that_of_the_reference_loader(files: tuple[Path, Path], text: Path) -> None:
    theirs, ours = evaluate(files, text, "llamacpp"), evaluate(files, text, "transformers")
    for row in ("plain", "longer"):
        pairs = list(zip(*(tasks["perplexity"]["rows"][row]["lengths"] for tasks in (theirs, ours))))
        assert [entry["set"] for entry, _ in pairs] == [entry["set"] for _, entry in pairs]
        for entry, expected in pairs:
            assert entry["documents"] == pytest.approx(expected["documents"], abs=TOLERANCE)
    sides = {name: tasks["retention"]["rows"]["longer"] for name, tasks in (("theirs", theirs), ("ours", ours))}
    for side in ("short", "long"):
        assert sides["theirs"][side]["ratio"] == pytest.approx(sides["ours"][side]["ratio"], abs=2 * TOLERANCE)
    assert abs(sides["ours"]["short"]["ratio"] - sides["ours"]["long"]["ratio"]) > 10 * TOLERANCE


def test_llama_cpp_answers_as_the_reference_loader_does(files: tuple[Path, Path]) -> None:
    found = {}
    for runtime in ("llamacpp", "transformers"):
        options = EvaluateOptions(
            models=files,
            lengths=(WINDOW, 400),
            runtime=runtime,
            threads=1,
            tasks=("passkey",),
            task_options={"trials": 1},
        )
        found[runtime] = run_evaluation(options, [describe(path) for path in files]).values
    theirs, ours = (
        {
            (name, trial["length"]): trial
            for name, row in each["tasks"]["passkey"]["rows"].items()
            for trial in row["trials"]
        }
        for each in found.values()
    )
    beyond = ("plain", 400)
    assert (theirs.pop(beyond)["text"], ours.pop(beyond)["text"] == "") == ("", False)
    for place, trial in theirs.items():
        # At the window of a file, and at L, the context ends with the answer: one token fewer.
        whole = len(trial["text"]) if place[1] == WINDOW else None
        assert trial == {**ours[place], "text": ours[place]["text"][:whole]}
    assert theirs["plain", WINDOW]["generated"] is True
    assert len({trial["text"] for trial in theirs.values()}) == 2
    said = "llama.cpp's server generates nothing beyond the 256 that the file declares"
    assert [said in note for note in found["llamacpp"]["notes"]] == [True]
    assert not any(said in note for note in found["transformers"]["notes"])


def test_choices_are_the_argmax_of_the_same_file_in_transformers(
    write_random_gguf: Callable[..., Path], random_llama: Any, tmp_path: Path
) -> None:
    from longrope_export.evaluation.engine import TransformersEngine

    ids = np.random.default_rng(0).integers(33, 127, 60)
    engine = LlamaCppEngine(write_random_gguf(tmp_path / "random.gguf"), None, 1)
    try:
        found, expected = engine.choices(ids, 5), TransformersEngine(random_llama).choices(ids, 5)
        losses = engine.losses(ids, first=50)
    finally:
        engine.close()
    assert len(found) == 55
    assert (found == expected).mean() > 0.95
    np.testing.assert_allclose(losses, TransformersEngine(random_llama).losses(ids, first=50), rtol=0, atol=2e-2)


def test_the_context_brings_about_the_set(files: tuple[Path, Path]) -> None:
    model = describe(files[1])
    row = ModelRow("longer", model, "unchanged", model.scaling, 400)
    # One more than the length, for the token after an answer, unless the next context has the long factors.
    assert context_for(row, row.factor_set(200), 200) == 201
    assert context_for(row, row.factor_set(WINDOW), WINDOW) == WINDOW
    assert context_for(row, row.factor_set(200, "long"), 200) == WINDOW + 1
    assert context_for(row, row.factor_set(512), 512) == 513
    with pytest.raises(ScalingError, match="applies the long factors of longer in a context of 512"):
        context_for(row, row.factor_set(257, "short"), 257)
    decided = ModelRow("longer", model, "unchanged", model.scaling, 400, "context", 300)
    assert context_for(decided, decided.factor_set(200), 200) == 301
    plain = ModelRow("plain", describe(files[0]), "unchanged", None, 400)
    assert context_for(plain, plain.factor_set(WINDOW), WINDOW) == WINDOW + 1


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"prefill_chunk": 8}, {"position_offset": 8}, {"switch": "long"}], ids=str
)
def test_what_llama_cpp_decides_by_itself_is_refused(files: tuple[Path, Path], text: Path, change: Any) -> None:
    options = EvaluateOptions(models=files[1:], data=(text,), runtime="llamacpp", tasks=("perplexity",), **change)
    with pytest.raises(LongRopeError, match="not with --runtime llamacpp"):
        run_evaluation(options, [describe(files[1])])
