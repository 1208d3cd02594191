"""The objective of llama.cpp: against the model in transformers, with every way in which a rewritten file could fail."""

from __future__ import annotations

import argparse
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.demo import demo_model_path
from longrope_export.errors import (
    InputFileError,
    MissingDependencyError,
    RuntimeFailure,
    ScalingError,
    UnsupportedModelError,
)
from longrope_export.fingerprint import fingerprint
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.runtimes import llamacpp_library
from longrope_export.runtimes.llamacpp_library import LIBRARY_FOLDER, library_path
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors import InProcess, Processes
from longrope_export.search.llamacpp_objective import FactorSlots, LlamaCppObjective, LlamaCppSource
from longrope_export.search.mixture import Document, Piece, plain
from longrope_export.search.objective import ModelObjective
from longrope_export.search.protocol import SEARCH, SHORT_SEARCH, Trial
from longrope_export.search.space import Candidate, PaperSpace, RopeNumbers, ShortSet, closed_form
from longrope_export.search.strategies.cmaes import CmaEs, CmaOptions, Sampling
from longrope_export.search.strategies.evolution import Evolution, EvolutionOptions
from longrope_export.search.strategies.log_space import LogSpace

NEEDLE, PENALTY = "needle", "penalty"
# llama.cpp keeps its cache in F16 and its sums in another order; factors move the losses of this text by 0.1 and more.
TOLERANCE = 2e-3


@dataclass(frozen=True)
class Demo:
    """The demo model in memory and as an F32 GGUF, its numbers, and documents of its tokens."""

    model: Any
    gguf: Path
    numbers: RopeNumbers
    documents: dict[str, tuple[Document, ...]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    import torch

    from longrope_export.evaluation.documents import load_tokenizer
    from longrope_export.loader import load

    torch.set_num_threads(1)
    gguf = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    convert_to_gguf(demo_model_path(), gguf, dtype="f32")
    ids = load_tokenizer(demo_model_path())(Path(argparse.__file__).read_text())["input_ids"]
    rows = [np.array(ids[start : start + 640], dtype=np.int64) for start in (0, 640)]
    answer = np.zeros(639)
    answer[-5:] = 0.2
    pieces = {
        SEARCH: (plain(rows[0]), plain(rows[1])),
        SHORT_SEARCH: (plain(rows[0][:200]),),
        NEEDLE: ((Piece(rows[0], answer),),),
        PENALTY: ((Piece(rows[1], answer), replace(plain(rows[1][:200])[0], penalty=True)),),
    }
    model = load(demo_model_path(), dtype=torch.float32)
    theta, head = model.config.rope_parameters["rope_theta"], model.config.head_dim
    numbers = RopeNumbers(rope_theta=theta, rotary_dim=head, window=256, target=640)
    return Demo(model, gguf, numbers, pieces)


def _source(demo: Demo, folder: Path, **changes: Any) -> LlamaCppSource:
    source = LlamaCppSource(demo.gguf, demo.numbers, demo.documents, 1, folder, patch_gguf, fingerprint(demo.gguf))
    return replace(source, **changes)


@pytest.fixture(scope="module")
def objective(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppObjective]:
    with _source(demo, tmp_path_factory.mktemp("objective")).open() as opened:
        yield opened


@pytest.fixture(scope="module")
def reference(demo: Demo) -> ModelObjective:
    return ModelObjective(demo.model, demo.numbers, demo.documents)


def _candidates(numbers: RopeNumbers) -> list[Candidate]:
    yarn = closed_form("yarn", numbers, 1.0)
    return [numbers.unchanged(), yarn, Candidate(yarn.factors, 1.3), closed_form("pi", numbers, 1.0), yarn]


@pytest.mark.parametrize("part", [SEARCH, SHORT_SEARCH, NEEDLE, PENALTY])
def test_losses_are_the_model_s_under_every_candidate(
    demo: Demo, objective: LlamaCppObjective, reference: ModelObjective, part: str
) -> None:
    trials = [Trial(each, part, 0) for each in _candidates(demo.numbers)]
    found = [objective.measure(trial).loss for trial in trials]
    expected = [reference.measure(trial).loss for trial in trials]
    assert found == pytest.approx(expected, abs=TOLERANCE)
    assert found[4] == found[1]
    assert len(set(found)) == 4
    assert max(expected) - min(expected) > 10 * TOLERANCE


def test_a_penalty_is_above_what_short_sequences_have_now(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = ShortSet(window=256, factors=(1.0,) * demo.numbers.pairs)
    numbers = replace(demo.numbers, base_attention_factor=1.1, switched=now)
    asked: list[Candidate] = []
    monkeypatch.setattr(LlamaCppObjective, "_loss", lambda self, candidate, piece: asked.append(candidate) or 1.0)
    with _source(demo, tmp_path, numbers=numbers).open() as opened:
        opened.measure(Trial(closed_form("yarn", numbers), PENALTY, 0))
    assert asked[2:] == [numbers.short_original()]
    assert numbers.short_original() != numbers.unchanged()


def test_the_second_document_is_another_text(
    demo: Demo, objective: LlamaCppObjective, reference: ModelObjective
) -> None:
    trial = Trial(closed_form("ntk", demo.numbers), SEARCH, 1)
    assert objective.measure(trial).loss == pytest.approx(reference.measure(trial).loss, abs=TOLERANCE)


def test_only_the_factors_and_the_attention_factor_are_rewritten(demo: Demo, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    unchanged = demo.numbers.unchanged()
    patch_gguf(demo.gguf, copy, demo.numbers.record(unchanged, unchanged, {}))
    before, pairs = np.fromfile(copy, np.uint8), demo.numbers.pairs
    factors = [1.1 + index for index in range(pairs)]
    FactorSlots(copy, pairs).write(factors, 1.25)
    after, header = np.fromfile(copy, np.uint8), read_gguf_header(copy)
    changed = set(np.flatnonzero(before != after).tolist())
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        info = header.tensor(name)
        assert info is not None
        place = range(header.data_start + info.offset, header.data_start + info.offset + 4 * pairs)
        assert after[place.start : place.stop].view("<f4").tolist() == np.float32(factors).tolist()
        changed -= set(place)
    entry = header.metadata["llama.rope.scaling.attn_factor"]
    assert changed
    assert changed <= set(range(entry.end - 4, entry.end))
    assert header.get("llama.rope.scaling.attn_factor") == 1.25
    with pytest.raises(ScalingError, match="3 factors"):
        FactorSlots(copy, pairs).write([1.0] * 3, 1.0)


def test_a_file_without_slots_is_refused(demo: Demo, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="rope_factors_long"):
        LlamaCppObjective(demo.gguf, demo.numbers, demo.documents)
    with pytest.raises(InputFileError, match="another model"), _source(demo, tmp_path, fingerprint="0").open():
        pass
    assert not list(tmp_path.iterdir())


def test_what_llama_cpp_cannot_do_is_refused(demo: Demo, objective: LlamaCppObjective) -> None:
    factors = demo.numbers.unchanged().factors
    with pytest.raises(ScalingError, match="--start-tokens"):
        objective.measure(Trial(Candidate(factors, 1.0, 4), SEARCH, 0))
    with pytest.raises(UnsupportedModelError, match="evolution or cmaes"):
        objective.measure(Trial(Candidate(factors), SEARCH, 0, gradient=True))


def test_a_killed_child_is_one_line_and_the_next_measure_begins_anew(demo: Demo, tmp_path: Path) -> None:
    trial = Trial(demo.numbers.unchanged(), SHORT_SEARCH, 0)
    with _source(demo, tmp_path).open() as objective:
        expected = objective.measure(trial)
        child = objective._child
        assert child is not None
        child.process.send_signal(signal.SIGKILL)
        with pytest.raises(RuntimeFailure, match=r"^llama\.cpp died by SIGKILL[^\n]*$"):
            objective.measure(trial)
        assert objective.measure(trial) == expected


def test_a_failed_assertion_of_llama_cpp_is_one_line(demo: Demo, tmp_path: Path) -> None:
    def spoiled(source: Path, target: Path, record: Any) -> None:
        patch_gguf(source, target, record)
        target.write_bytes(target.read_bytes().replace(b"longrope", b"longropf", 1))

    spoil = _source(demo, tmp_path, patch=spoiled)
    with (
        spoil.open() as objective,
        pytest.raises(RuntimeFailure, match=r"^llama\.cpp died by SIGABRT[^\n]*GGML_ASSERT"),
    ):
        objective.measure(Trial(demo.numbers.unchanged(), SHORT_SEARCH, 0))


def test_a_refused_file_is_one_line(demo: Demo, tmp_path: Path) -> None:
    def spoiled(source: Path, target: Path, record: Any) -> None:
        patch_gguf(source, target, record)
        target.write_bytes(target.read_bytes().replace(b"output_norm.weight", b"output_nOrm.weight", 1))

    spoil = _source(demo, tmp_path, patch=spoiled)
    with spoil.open() as objective, pytest.raises(RuntimeFailure, match=r"refused[^\n]*output_norm"):
        objective.measure(Trial(demo.numbers.unchanged(), SHORT_SEARCH, 0))


def test_a_token_outside_the_vocabulary_is_refused(demo: Demo, tmp_path: Path) -> None:
    documents = {SEARCH: (plain(np.array([1, 2, 10**6], dtype=np.int64)),)}
    with _source(demo, tmp_path, documents=documents).open() as objective:
        with pytest.raises(RuntimeFailure, match="outside the vocabulary"):
            objective.measure(Trial(demo.numbers.unchanged(), SEARCH, 0))


def test_the_copy_is_removed(demo: Demo, tmp_path: Path) -> None:
    with _source(demo, tmp_path).open() as objective:
        objective.measure(Trial(demo.numbers.unchanged(), SHORT_SEARCH, 0))
        copies = list(tmp_path.rglob("*.gguf"))
        assert len(copies) == 1
        assert abs(copies[0].stat().st_size - demo.gguf.stat().st_size) < 4096
    assert not list(tmp_path.iterdir())


def _evolved(executor: Any, demo: Demo) -> tuple[list[Candidate], list[float]]:
    strategy = Evolution(
        PaperSpace(demo.numbers.pairs, 5.0, 0.01, (0,)),
        [closed_form("yarn", demo.numbers, 1.0)],
        EvolutionOptions(population=2, iterations=1, mutations=1, crossovers=1, parents=2),
        documents=1,
        evaluations=4,
        attention_factor=1.0,
        generator=np.random.default_rng(0),
        part=SHORT_SEARCH,
    )
    Evaluator(executor, {SHORT_SEARCH: 1}).run(strategy)
    return strategy.finalists(), strategy.history


def test_evolution_runs_on_it_and_ends_alike_in_several_processes(demo: Demo, tmp_path: Path) -> None:
    with _source(demo, tmp_path).open() as objective:
        expected = _evolved(InProcess(objective), demo)
    with Processes(_source(demo, tmp_path), 2) as executor:
        assert _evolved(executor, demo) == expected
    assert not list(tmp_path.iterdir())
    assert len(expected[1]) == 2


def test_a_library_of_one_s_own(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_FOLDER, str(tmp_path))
    with pytest.raises(MissingDependencyError, match="holds no libllama"):
        library_path()
    monkeypatch.delenv(LIBRARY_FOLDER)
    (tmp_path / "libllama.so").symlink_to(library_path())
    monkeypatch.setenv(LIBRARY_FOLDER, str(tmp_path))
    assert library_path() == tmp_path / "libllama.so"


def test_without_llama_cpp_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llamacpp_library, "_inside", lambda package, pattern: None)
    with pytest.raises(MissingDependencyError, match=r"longrope-export\[runtime\]"):
        library_path()


def _own_build() -> Path | None:
    return llamacpp_library._inside("llama_cpp", "lib/libllama.so")


if _own_build():

    def test_llama_cpp_python_s_library_gives_the_same(
        demo: Demo, reference: ModelObjective, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only where llama-cpp-python is installed: it has no prebuilt wheel."""
        monkeypatch.setenv(LIBRARY_FOLDER, str((_own_build() or Path()).parent))
        trial = Trial(closed_form("yarn", demo.numbers), SEARCH, 0)
        with _source(demo, tmp_path).open() as objective:
            assert objective.measure(trial).loss == pytest.approx(reference.measure(trial).loss, abs=TOLERANCE)


@dataclass(frozen=True)
class Smol:
    """The real, quantised SmolLM2: its file, its numbers, two texts, and the dequantised model in torch."""

    gguf: Path
    numbers: RopeNumbers
    documents: dict[str, tuple[Document, ...]]
    reference: ModelObjective


@pytest.fixture(scope="module")
def smol(smollm2: Path) -> Smol:
    import torch

    from longrope_export.evaluation.documents import load_tokenizer
    from longrope_export.loader import load

    torch.set_num_threads(1)
    ids = np.array(load_tokenizer(smollm2)(Path(shutil.__file__).read_text())["input_ids"], dtype=np.int64)
    documents = {SEARCH: (plain(ids[:512]),), SHORT_SEARCH: (plain(ids[512:768]),)}
    numbers = RopeNumbers(rope_theta=100000.0, rotary_dim=64, window=8192, target=16384)
    reference = ModelObjective(load(smollm2, dtype=torch.float32), numbers, documents)
    return Smol(smollm2, numbers, documents, reference)


def _smol_source(smol: Smol, folder: Path) -> LlamaCppSource:
    return LlamaCppSource(smol.gguf, smol.numbers, smol.documents, 2, folder, patch_gguf, fingerprint(smol.gguf))


@pytest.mark.slow
def test_smollm2(smol: Smol, tmp_path: Path) -> None:
    """Candidates come in the order that the dequantised model puts them in."""
    candidates = [smol.numbers.unchanged(), *(closed_form(name, smol.numbers, 1.0) for name in ("yarn", "ntk", "pi"))]
    expected = [smol.reference.measure(Trial(each, SEARCH, 0)).loss for each in candidates]
    with _smol_source(smol, tmp_path).open() as objective:
        found = [objective.measure(Trial(each, SEARCH, 0)).loss for each in candidates]
    assert np.argsort(found).tolist() == np.argsort(expected).tolist()
    assert found == pytest.approx(expected, abs=0.02)
    assert max(expected) - min(expected) > 0.1


@pytest.mark.slow
def test_cmaes_on_smollm2_finds_what_the_dequantised_model_confirms(smol: Smol, tmp_path: Path) -> None:
    """From linear interpolation, which costs much inside the window, a few candidates of 256 tokens lead some way back."""
    start = closed_form("pi", smol.numbers, 1.0)
    strategy = CmaEs(
        start,
        CmaOptions(population=6, knots=4),
        Sampling(24, 1),
        LogSpace(smol.numbers.pairs),
        learn_attention=False,
        documents=1,
        validation_documents=1,
        generator=np.random.default_rng(0),
        race=False,
        parts=(SHORT_SEARCH, SHORT_SEARCH),
    )
    with _smol_source(smol, tmp_path).open() as objective:
        evaluator = Evaluator(InProcess(objective), {SHORT_SEARCH: 1})
        evaluator.run(strategy)
        finalists = strategy.finalists()
        losses = evaluator.mean_losses([start, *finalists], SHORT_SEARCH)
    best = [start, *finalists][int(np.argmin(losses))]
    before, after = (smol.reference.measure(Trial(each, SHORT_SEARCH, 0)).loss for each in (start, best))
    assert losses[0] - min(losses) > 0.05
    assert [losses[0], min(losses)] == pytest.approx([before, after], abs=0.02)
