"""A whole search on a tiny random model in memory: determinism, every option, the choice, the record."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longrope_export.errors import (
    LongRopeError,
    NumericalError,
    ScalingError,
    StaleStateError,
    TextTooShortError,
    UnsupportedModelError,
)
from longrope_export.scaling import RopeScaling
from longrope_export.search.documents import SHORT_PIECES, pieces_of, split_rows
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors import InProcess
from longrope_export.search.factors import SearchResult, search_factors
from longrope_export.search.objective import ModelObjective
from longrope_export.search.protocol import SEARCH, VALIDATION, Outcome, Trial
from longrope_export.search.run import SearchConfig
from longrope_export.search.space import Candidate, closed_form
from longrope_export.search.strategies.cmaes import CmaOptions
from longrope_export.search.strategies.evolution import EvolutionOptions
from longrope_export.search.strategies.gradient import GradientOptions

GRADIENT: dict[str, Any] = {"budget": "40", "documents": 2, "validation_documents": 2, "short_share": 0.1}
SMALL = EvolutionOptions(population=6, iterations=3, mutations=4, crossovers=4, parents=4)
EVOLUTION: dict[str, Any] = {
    "strategy": "evolution", "budget": "24", "documents": 2, "validation_documents": 2, "short_share": 0.5,
    "evolution": SMALL,
}  # fmt: skip
CMAES: dict[str, Any] = {"strategy": "cmaes", "budget": "48", "documents": 3, "validation_documents": 2}
CRITICAL: dict[str, Any] = {**GRADIENT, "strategy": "critical-dim", "critical_indices": (1, 3)}
LONGROPE2: dict[str, Any] = {
    **EVOLUTION, "strategy": "critical-dim", "optimiser": "evolution", "critical_indices": (1, 3),
}  # fmt: skip
NAMED = {
    "gradient": GRADIENT, "evolution": EVOLUTION, "cmaes": CMAES, "critical-dim": CRITICAL, "longrope2": LONGROPE2,
}  # fmt: skip
ALL = pytest.mark.parametrize("name", NAMED)
Done = Callable[[str], tuple[SearchResult, bytes]]


def _run(tiny: Any, journal: Path | None = None, kind: str = "hf", **options: Any) -> SearchResult:
    return search_factors(tiny.model, tiny.numbers, tiny.rows, SearchConfig(**options), journal, kind=kind)


def _trials(path: Path) -> list[Any]:
    return [json.loads(line)["of"] for line in path.read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def done(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Result and journal of a search of `NAMED`, which is run once for all tests."""
    folder = tmp_path_factory.mktemp("done")

    @cache
    def search(name: str) -> tuple[SearchResult, bytes]:
        path = folder / f"{name}.jsonl"
        return _run(tiny, path, **NAMED[name]), path.read_bytes()

    return search


@pytest.fixture
def journal(tmp_path: Path, done: Done) -> Callable[[str], Path]:
    """A copy of the journal of a search of `NAMED`."""

    def copy(name: str) -> Path:
        path = tmp_path / f"copied-{name}.jsonl"
        path.write_bytes(done(name)[1])
        return path

    return copy


@ALL
def test_a_search_is_deterministic_and_its_seed_matters(
    tiny: Any, tmp_path: Path, done: Done, journal: Callable[[str], Path], name: str
) -> None:
    first, again, other = journal(name), tmp_path / "again.jsonl", tmp_path / "other.jsonl"
    assert _run(tiny, again, **NAMED[name], seed=0).to_dict() == done(name)[0].to_dict()
    assert _run(tiny, other, **NAMED[name], seed=1).history != done(name)[0].history
    assert _trials(first) == _trials(again) != _trials(other)


@ALL
def test_a_finished_journal_is_replayed_without_measuring(
    tiny: Any, done: Done, journal: Callable[[str], Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = journal(name)
    monkeypatch.setattr(ModelObjective, "measure", lambda self, trial: pytest.fail("measured again"))
    assert _run(tiny, path, **NAMED[name]).scaling.to_json() == done(name)[0].scaling.to_json()
    assert path.read_bytes() == done(name)[1]


@ALL
def test_a_journal_cut_anywhere_ends_in_the_same_record(tiny: Any, tmp_path: Path, done: Done, name: str) -> None:
    path, (first, data) = tmp_path / "journal.jsonl", done(name)
    for share in (0.02, 0.4, 0.7, 0.97):
        path.write_bytes(data[: int(len(data) * share)])
        assert _run(tiny, path, **NAMED[name]).scaling.to_json() == first.scaling.to_json()
        assert [json.loads(line)["of"] for line in data.splitlines()[1:]] == _trials(path)


@ALL
def test_the_budget_is_kept_and_stated(done: Done, name: str) -> None:
    result, _ = done(name)
    budget = float(NAMED[name]["budget"])
    assert 0.7 * budget < result.evaluations <= budget
    assert result.scaling.provenance["evaluations"] == result.evaluations
    assert result.validation_evaluations > 0


@pytest.mark.parametrize("options", [GRADIENT, EVOLUTION])
def test_the_result_is_never_worse_than_a_closed_form_on_the_validation_documents(
    tiny: Any, options: dict[str, Any]
) -> None:
    result = _run(tiny, **options, start_tokens=(0,))
    assert result.validation_perplexity[result.chosen] == min(result.validation_perplexity.values())
    assert set(result.validation_perplexity) == {"yarn", "ntk", "pi", "critical-dim", "searched"}
    # Measured again here, from the record alone.
    objective = ModelObjective(tiny.model, tiny.numbers, {VALIDATION: tiny.rows[2:4]})
    evaluator = Evaluator(InProcess(objective), {VALIDATION: 2})
    found = Candidate(
        result.scaling.long_factor, result.scaling.long_attention_factor, result.scaling.long_start_tokens
    )
    attention = None if options is GRADIENT else found.attention_factor
    forms = [closed_form(name, tiny.numbers, attention) for name in ("yarn", "ntk", "pi", "critical-dim")]
    losses = evaluator.mean_losses([found, *forms], VALIDATION)
    objective.close()
    assert losses[0] == min(losses)
    assert np.exp(losses[0]) == pytest.approx(result.validation_perplexity[result.chosen])


def test_a_closed_form_wins_where_the_search_finds_nothing_better(tiny: Any) -> None:
    lost = GradientOptions(trust_region=1e-12)
    result = _run(tiny, **{**GRADIENT, "start_tokens": (0,)}, gradient=lost)
    assert result.chosen != "searched"
    assert any("not beaten" in note for note in result.notes)
    expected = tiny.numbers.record(closed_form(result.chosen, tiny.numbers), tiny.numbers.unchanged(), {})
    assert result.scaling.long_factor == expected.long_factor


def test_the_record_says_where_it_comes_from(done: Done) -> None:
    result, _ = done("gradient")
    scaling = result.scaling
    assert (scaling.original_max_position_embeddings, scaling.max_position_embeddings) == (32, 128)
    wanted = {"strategy", "seed", "evaluations", "search_perplexity", "validation_perplexity", "data", "model"}
    wanted |= {"versions", "configuration", "threads", "chosen", "short"}
    assert wanted <= set(scaling.provenance)
    assert RopeScaling.from_json(scaling.to_json()) == scaling
    assert not any("time" in name or "second" in name for name in scaling.provenance)
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_model_is_left_as_it_was(tiny: Any) -> None:
    ids = torch.tensor([tiny.rows[0][:40].tolist()])
    before = tiny.model(input_ids=ids).logits
    _run(tiny, **GRADIENT)
    assert torch.equal(before, tiny.model(input_ids=ids).logits)


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (GRADIENT, {"budget": "20"}),
    (GRADIENT, {"documents": 3}),
    (GRADIENT, {"validation_documents": 3}),
    (GRADIENT, {"seed": 5}),
    (GRADIENT, {"runtime": "gguf"}),
    (GRADIENT, {"attention": "su"}),
    (GRADIENT, {"learn_attention": False}),
    (GRADIENT, {"learn_short_attention": True}),
    (GRADIENT, {"baselines": ("ntk",)}),
    (GRADIENT, {"start_tokens": (0, 2, 3)}),
    (GRADIENT, {"short": "original"}),
    (GRADIENT, {"short_share": 0.3}),
    (GRADIENT, {"gradient": GradientOptions(learning_rate=0.02)}),
    (GRADIENT, {"gradient": GradientOptions(attention_rate=1.0)}),
    (GRADIENT, {"gradient": GradientOptions(full_rate_turns=100.0)}),
    (GRADIENT, {"gradient": GradientOptions(warm_up=0.5)}),
    (GRADIENT, {"gradient": GradientOptions(trust_region=0.01)}),
    (GRADIENT, {"gradient": GradientOptions(average=1.0)}),
    (GRADIENT, {"gradient": GradientOptions(documents_per_step=2)}),
    (GRADIENT, {"gradient": GradientOptions(constraint="none")}),
    (GRADIENT, {"gradient": GradientOptions(constraint="paper"), "bound": 1.0}),
    (EVOLUTION, {"strategy": "gradient"}),
    (EVOLUTION, {"bound": 2.0}),
    (EVOLUTION, {"step": 0.05}),
    (EVOLUTION, {"start_tokens": (0, 3)}),
    (EVOLUTION, {"attention": "1.0"}),
    (EVOLUTION, {"short": "original"}),
    (EVOLUTION, {"race": True, "documents": 3}),
    (EVOLUTION, {"short_bound": 1.5}),
    (GRADIENT, {"objective": "last"}),
    (GRADIENT, {"objective": "perplexity,short"}),
    (GRADIENT, {"report_documents": 1}),
    (GRADIENT, {"sets": ("2x",)}),
    (GRADIENT, {"strategy": "cmaes"}),
    (GRADIENT, {"strategy": "critical-dim"}),
    (EVOLUTION, {"evolution": EvolutionOptions(population=7, iterations=3, mutations=4, crossovers=4, parents=4)}),
]


@pytest.mark.parametrize(
    "asked",
    [
        {**EVOLUTION, "attention": "1.1"},
        {**GRADIENT, "attention": "1.1"},
        {**GRADIENT, "learn_attention": True, "baselines": ("ntk",)},
        {**GRADIENT, "attention": "method", "learn_attention": True, "baselines": ("ntk",)},
    ],
    ids=["evolution 1.1", "gradient 1.1", "learned from 1.0", "learned from the method's"],
)
def test_a_gguf_has_the_attention_factor_that_was_asked_for_in_both_regimes(tiny: Any, asked: dict[str, Any]) -> None:
    scaling = _run(tiny, **{**asked, "start_tokens": None}, runtime="gguf").scaling
    assert scaling.short_attention_factor == scaling.long_attention_factor != 1.0
    if not asked.get("learn_attention"):
        assert scaling.long_attention_factor == pytest.approx(1.1)
    unasked = {name: value for name, value in asked.items() if name not in ("attention", "learn_attention")}
    assert _run(tiny, **{**unasked, "start_tokens": None}, runtime="gguf").scaling.long_attention_factor == 1.0


@pytest.mark.parametrize(("base", "change"), CHANGES, ids=[str(change)[:60] for _, change in CHANGES])
def test_every_option_changes_what_is_measured(
    tiny: Any, tmp_path: Path, journal: Callable[[str], Path], base: dict[str, Any], change: dict[str, Any]
) -> None:
    path = tmp_path / "journal.jsonl"
    _run(tiny, path, **{**base, **change})
    assert _trials(path) != _trials(journal(base.get("strategy", "gradient")))
    # Continuing the changed search with the unchanged options is refused, by the name of what differs.
    with pytest.raises(StaleStateError, match="belongs to another search: "):
        _run(tiny, path, **base)


def test_the_constraint_s_bound_counts_in_the_gradient_search(tiny: Any, tmp_path: Path) -> None:
    for bound in (1.0, 1.25):
        _run(tiny, tmp_path / f"{bound}.jsonl", **GRADIENT, bound=bound, gradient=GradientOptions(constraint="paper"))
    assert _trials(tmp_path / "1.0.jsonl") != _trials(tmp_path / "1.25.jsonl")


@pytest.mark.parametrize("good", [0, 5])
def test_a_gradient_that_is_not_finite_ends_the_descent_and_its_journal_says_the_same(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, good: int
) -> None:
    path, real, count = tmp_path / "journal.jsonl", ModelObjective.measure, itertools.count()

    def breaking(self: Any, trial: Trial) -> Outcome:
        outcome = real(self, trial)
        broken = trial.gradient and trial.part == SEARCH and next(count) >= good
        return replace(outcome, gradient=(math.nan,) * 17) if broken else outcome

    monkeypatch.setattr(ModelObjective, "measure", breaking)
    if not good:
        for _ in range(2):
            with pytest.raises(NumericalError, match="gradient is NaN or infinite"):
                _run(tiny, path, **GRADIENT)
        return
    first = _run(tiny, path, **GRADIENT)
    assert any(f"became NaN or infinite at step {good + 1} of" in note for note in first.notes)
    assert len(first.history) == good
    monkeypatch.setattr(ModelObjective, "measure", lambda self, trial: pytest.fail("measured again"))
    assert _run(tiny, path, **GRADIENT).to_dict() == first.to_dict()


def test_a_gguf_search_finds_only_what_a_gguf_holds(tiny: Any, tmp_path: Path) -> None:
    for options in (GRADIENT, EVOLUTION):
        path = tmp_path / f"{options.get('strategy')}.jsonl"
        scaling = _run(tiny, path, kind="gguf", **options).scaling
        assert scaling.long_attention_factor == scaling.short_attention_factor == 1.0
        assert scaling.long_start_tokens == scaling.short_start_tokens == 0
        assert {tuple(trial[3][1:]) for trial in _trials(path)} == {(1.0, 0)}


def test_evolution_says_that_its_budget_stopped_it(tiny: Any) -> None:
    result = _run(tiny, **{**EVOLUTION, "evolution": EvolutionOptions(), "short": "original"})
    assert "24 of its 1,344 evaluations" in result.notes[0]
    assert not any("Algorithm 1" in note for note in _run(tiny, **{**EVOLUTION, "budget": "80"}).notes)


def test_a_time_budget_s_plan_is_kept_by_the_journal(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    options = {**GRADIENT, "budget": "2s"}
    first = _run(tiny, path, **options)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(lines) // 2]))
    assert _run(tiny, path, **options).scaling.to_json() == first.scaling.to_json()


def test_the_thread_count_is_part_of_the_journal(tiny: Any, journal: Callable[[str], Path]) -> None:
    path = journal("gradient")
    torch.set_num_threads(2)
    try:
        with pytest.raises(StaleStateError, match=": threads is 1 there and 2 now"):
            _run(tiny, path, **GRADIENT)
    finally:
        torch.set_num_threads(1)


OTHER_CHANGES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("cmaes", {}, {"cmaes": CmaOptions(sigma=0.1)}),
    ("cmaes", {}, {"race": False}),
    ("critical-dim", {}, {"critical_indices": (2, 3)}),
    ("critical-dim", {}, {"optimiser": "cmaes", "budget": "90"}),
    ("critical-dim", {}, {"optimiser": "evolution"}),
    ("longrope2", {}, {"critical_indices": (2, 3)}),
    ("longrope2", {}, {"bound": 1.5}),
    (
        "longrope2",
        {},
        {"evolution": EvolutionOptions(population=7, iterations=3, mutations=4, crossovers=4, parents=4)},
    ),
    ("gradient", {"sets": ("2x",)}, {"sets_share": 0.3}),
    ("gradient", {"objective": "last"}, {"last_share": 0.5}),
]


@pytest.mark.parametrize(("name", "more", "change"), OTHER_CHANGES, ids=[str(each[2])[:60] for each in OTHER_CHANGES])
def test_options_of_the_other_strategies_change_what_is_measured(
    tiny: Any, tmp_path: Path, journal: Callable[[str], Path], name: str, more: dict[str, Any], change: dict[str, Any]
) -> None:
    base = {**NAMED[name], **more}
    first, second = tmp_path / "first.jsonl" if more else journal(name), tmp_path / "second.jsonl"
    if more:
        _run(tiny, first, **base)
    _run(tiny, second, **{**base, **change})
    assert _losses(first) != _losses(second)
    with pytest.raises(StaleStateError, match=r": configuration\."):
        _run(tiny, first, **{**base, **change})


def _losses(path: Path) -> list[Any]:
    return [(value["of"], value["loss"]) for value in map(json.loads, path.read_text().splitlines()[1:])]


def test_sets_are_in_the_record_and_must_lie_in_between(tiny: Any) -> None:
    scaling = _run(tiny, **GRADIENT, sets=("2x", "96")).scaling
    assert list(scaling.sets) == [64, 96]
    assert scaling.sets[64] != scaling.sets[96]
    for length in ("1x", "4x", "16"):
        with pytest.raises(ScalingError, match="must be between 32 and 128"):
            _run(tiny, **GRADIENT, sets=(length,))


def test_report_documents_choose_nothing(tiny: Any, done: Done) -> None:
    plain, reported = done("gradient")[0], _run(tiny, **GRADIENT, report_documents=2)
    assert reported.scaling.long_factor == plain.scaling.long_factor
    assert not plain.report_perplexity
    objective = ModelObjective(tiny.model, tiny.numbers, {"report": tiny.rows[4:6]})
    loss = Evaluator(InProcess(objective), {"report": 2}).mean_losses([tiny.numbers.unchanged()], "report")[0]
    objective.close()
    assert reported.report_perplexity["unchanged"] == pytest.approx(np.exp(loss))


def test_other_data_and_another_model_are_refused_by_name(tiny: Any, journal: Callable[[str], Path]) -> None:
    path = journal("gradient")
    with pytest.raises(StaleStateError, match=": data is "):
        search_factors(tiny.model, tiny.numbers, tiny.rows[1:], SearchConfig(**GRADIENT), path)
    weight = tiny.model.lm_head.weight
    kept = weight[0, 0].item()
    with torch.no_grad():
        weight[0, 0] += 1.0
    try:
        with pytest.raises(StaleStateError, match=": model is "):
            _run(tiny, path, **GRADIENT)
    finally:
        with torch.no_grad():
            weight[0, 0] = kept


def test_rows_that_are_missing_or_short_are_refused(tiny: Any) -> None:
    with pytest.raises(TextTooShortError, match="3 documents were given"):
        search_factors(tiny.model, tiny.numbers, tiny.rows[:3], SearchConfig(**GRADIENT))
    with pytest.raises(TextTooShortError, match="document 4 has 100 tokens; 128 are needed"):
        search_factors(tiny.model, tiny.numbers, [*tiny.rows[:3], tiny.rows[3][:100]], SearchConfig(**GRADIENT))


@pytest.mark.parametrize(
    ("same", "words"),
    [((0, 3), "validation document 2 is the same as search document 1"),
     ((1, 4), "report document 1 is the same as search document 2"),
     ((2, 4), "report document 1 is the same as validation document 1")],
)  # fmt: skip
def test_a_row_in_two_parts_is_refused(tiny: Any, tmp_path: Path, same: tuple[int, int], words: str) -> None:
    rows = list(tiny.rows)
    rows[same[1]] = np.append(rows[same[0]], 5)  # what is beyond the target does not tell rows apart
    config = SearchConfig(**GRADIENT, report_documents=1)
    with pytest.raises(LongRopeError, match=words):
        search_factors(tiny.model, tiny.numbers, rows, config, tmp_path / "journal.jsonl")
    assert not (tmp_path / "journal.jsonl").exists()


def test_search_and_validation_rows_are_disjoint_and_the_short_pieces_too() -> None:
    rows = [np.concatenate([[1], np.arange(1000 * index, 1000 * index + 127)]) for index in range(1, 5)]
    parts = split_rows(rows, documents=2, validation=2, window=32, target=128, bos=1)
    assert [len(parts[name]) for name in ("search", "validation", "short-search", "short-validation")] == [2, 2, 8, 8]
    bodies = [set(row[1:].tolist()) for row in (*parts["search"], *parts["validation"])]
    assert sum(map(len, bodies)) == len(set.union(*bodies))
    pieces = parts["short-search"]
    assert all(len(piece) == 32 and piece[0] == 1 for piece in pieces)
    inside = [set(piece[1:].tolist()) for piece in pieces]
    assert sum(map(len, inside)) == len(set.union(*inside))
    assert set.union(*inside) <= bodies[0] | bodies[1]


def test_the_early_part_holds_all_disjoint_pieces_of_the_search_rows() -> None:
    rows = [np.concatenate([[1], np.arange(1000 * index, 1000 * index + 127)]) for index in range(1, 4)]
    parts = split_rows(rows, documents=2, validation=1, window=32, target=128, bos=1, early_length=64)
    pieces = parts["early-search@64"]
    assert [len(piece) for piece in pieces] == [64] * 4
    inside = [set(piece[1:].tolist()) for piece in pieces]
    assert len(set.union(*inside)) == 4 * 63
    assert set.union(*inside) <= set(rows[0].tolist()) | set(rows[1].tolist())


def test_early_steps_are_measured_on_short_pieces_and_cost_less(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    options = {**GRADIENT, "short": "original"}
    plain = _run(tiny, **options)
    later = _run(tiny, **options, early_length="2x", early_share=0.1)
    result = _run(tiny, path, **options, early_length="2x", early_share=0.5)
    trials = [json.loads(line)["of"] for line in path.read_text().splitlines()[1:]]
    steps = [part for part, _, gradient, _ in trials if gradient]
    early = 2 * tiny.numbers.window
    assert set(steps) == {f"early-search@{early}", "search"}
    assert abs(steps.count("search") - len(steps) / 2) <= 1
    assert len(steps) > len(plain.history)
    assert result.evaluations <= plain.evaluations + 0.5
    assert result.history != later.history


@pytest.mark.parametrize("length", ["0.5x", "1000x"])
def test_an_early_length_outside_the_windows_is_refused(tiny: Any, length: str) -> None:
    with pytest.raises(ScalingError, match="early-length"):
        _run(tiny, **GRADIENT, early_length=length)


def test_without_a_number_all_rows_that_are_left_are_searched_on(tiny: Any) -> None:
    options = {**GRADIENT, "budget": "10"}
    del options["documents"]
    result = _run(tiny, **options)
    assert result.documents == len(tiny.rows) - options["validation_documents"]


def test_short_pieces_without_bos() -> None:
    pieces = pieces_of(np.arange(5, 133), 32, 1, SHORT_PIECES)
    assert [piece[0] for piece in pieces] == [5, 37, 69, 101]


def test_a_model_that_ignores_its_factors_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_apply", "apply"):
        monkeypatch.setattr(ModelObjective, name, lambda self, *_: None)
    real = ModelObjective._losses

    def rounded(self: ModelObjective, candidates: Sequence[Candidate], piece: Any) -> list[float]:
        # As rows of one pass, which matrix products over several threads round differently.
        return [loss + index * 1e-7 for index, loss in enumerate(real(self, candidates, piece))]

    monkeypatch.setattr(ModelObjective, "_losses", rounded)
    with pytest.raises(UnsupportedModelError, match="different factors give the same loss"):
        _run(tiny, **GRADIENT)


def test_a_budget_that_is_too_small_leaves_nothing(tiny: Any, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with pytest.raises(LongRopeError, match="does not pay for one step"):
        _run(tiny, path, **{**GRADIENT, "budget": "1"})
    assert not path.exists()
