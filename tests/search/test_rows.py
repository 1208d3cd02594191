"""Several candidates as the rows of one forward pass: who is put together, and that nobody's loss changes by it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_objective import ToySource, toy_outcome

from longrope_export.search.config import SearchConfig
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors import Processes
from longrope_export.search.executors.local import InProcess
from longrope_export.search.factors import search_factors
from longrope_export.search.journal import Journal
from longrope_export.search.mixture import Mixture
from longrope_export.search.objective import PASS_TOKENS, ROW_TOKENS, ModelObjective
from longrope_export.search.protocol import SEARCH, VALIDATION, Outcome, Pass, Trial
from longrope_export.search.space import Candidate
from longrope_export.search.strategies.evolution import EvolutionOptions

ROWS = {SEARCH: 3}
CANDIDATES = [Candidate((1.0, float(value))) for value in range(2, 7)]
# Different in every field, so that a row with another's set shows.
DIFFERENT = [
    Candidate(tuple(np.linspace(1.0, most, 16).tolist()), attention, start)
    for most, attention, start in ((1.5, 1.0, 0), (3.0, 1.1, 8), (5.0, 1.2, 0), (4.0, 0.9, 16))
]


class Recording:
    """The passes that were run; a loss tells its candidate, its document and the size of its pass."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []

    def run(self, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        for index in reversed(range(len(passes))):
            self.passes.append(passes[index])
            yield index, [_sized(trial, len(passes[index])) for trial in passes[index]]


def _sized(trial: Trial, size: int) -> Outcome:
    return Outcome(trial.candidate.factors[1] + trial.document / 8 + size / 64)


def _asked(part: str = SEARCH, gradient: bool = False) -> list[Trial]:
    return [Trial(candidate, part, document, gradient) for candidate in CANDIDATES for document in range(2)]


def test_candidates_on_one_document_fill_a_pass_in_the_order_asked() -> None:
    executor = Recording()
    outcomes = Evaluator(executor, {SEARCH: 2}, rows=ROWS).evaluate(_asked())
    found = [[(trial.candidate.factors[1], trial.document) for trial in each] for each in reversed(executor.passes)]
    assert found == [
        [(2.0, 0), (3.0, 0), (4.0, 0)], [(2.0, 1), (3.0, 1), (4.0, 1)], [(5.0, 0), (6.0, 0)], [(5.0, 1), (6.0, 1)]
    ]  # fmt: skip
    assert outcomes == [_sized(trial, 3 if trial.candidate.factors[1] < 5.0 else 2) for trial in _asked()]


@pytest.mark.parametrize(
    ("part", "gradient", "rows"), [(VALIDATION, False, ROWS), (SEARCH, True, ROWS), (SEARCH, False, {})]
)
def test_gradients_and_parts_that_have_no_rows_stay_alone(part: str, gradient: bool, rows: dict[str, int]) -> None:
    executor = Recording()
    Evaluator(executor, {SEARCH: 2, VALIDATION: 2}, rows=rows).evaluate(_asked(part, gradient))
    assert [len(each) for each in executor.passes] == [1] * 10


def test_a_pass_that_a_kill_cut_is_measured_with_the_same_trials_again(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"

    def evaluate() -> tuple[list[Outcome], list[Pass]]:
        executor = Recording()
        with Journal(path) as journal:
            if journal.header is None:
                journal.begin({})
            return Evaluator(executor, {SEARCH: 2}, journal, rows=ROWS).evaluate(_asked()), executor.passes

    outcomes, passes = evaluate()
    header, *lines = path.read_text().splitlines(keepends=True)
    # The last pass that ran lost one trial, the one before it is whole, the other two are lost.
    path.write_text("".join([header, *lines[:2], *lines[2:4], *lines[4:5]]))
    assert evaluate() == (outcomes, passes[2:])
    again = [json.loads(line)["trial"] for line in path.read_text().splitlines()[1:]]
    assert sorted(again) == list(range(10))


@pytest.fixture
def objective(tiny: Any) -> Iterator[ModelObjective]:
    made = ModelObjective(tiny.model, tiny.numbers, {SEARCH: tiny.rows})
    yield made
    made.close()


def _rows_and_singles(objective: ModelObjective, document: int = 0) -> tuple[list[float], list[float]]:
    trials = tuple(Trial(candidate, SEARCH, document) for candidate in DIFFERENT)
    return [each.loss for each in objective.measure_rows(trials)], [objective.measure(each).loss for each in trials]


def test_a_row_s_loss_is_that_of_its_candidate_alone(objective: ModelObjective) -> None:
    rows, singles = _rows_and_singles(objective, 1)
    assert rows == pytest.approx(singles, abs=1e-6)
    assert len({round(loss, 4) for loss in singles}) == len(DIFFERENT)


def test_a_row_s_loss_is_its_candidate_s_in_a_mixture_with_a_penalty(tiny: Any) -> None:
    short = [row[: tiny.numbers.short_window] for row in tiny.rows[:2]]
    documents = Mixture.parse("perplexity,last=2,short=3").documents(tiny.rows[:2], short, None, (0,))
    objective = ModelObjective(tiny.model, tiny.numbers, {SEARCH: documents})
    rows, singles = _rows_and_singles(objective)
    objective.close()
    assert rows == pytest.approx(singles, abs=1e-6)


def _mixed_up(patch: pytest.MonkeyPatch, change: Callable[[list[Any]], list[Any]]) -> None:
    real = ModelObjective.apply
    patch.setattr(ModelObjective, "apply", lambda self, candidates: real(self, change(list(candidates))))


MUTANTS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "the first candidate's set for all rows": lambda rows: rows[:1] * len(rows),
    "rows in the opposite order": lambda rows: rows[::-1],
    "no n̂": lambda rows: [Candidate(each.factors, each.attention_factor) for each in rows],
    "no attention factor": lambda rows: [Candidate(each.factors, 1.0, each.start_tokens) for each in rows],
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_row_with_another_s_set_is_seen(
    objective: ModelObjective, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trials = tuple(Trial(candidate, SEARCH, 0) for candidate in DIFFERENT)
    singles = [objective.measure(each).loss for each in trials]
    _mixed_up(monkeypatch, MUTANTS[name])
    assert [each.loss for each in objective.measure_rows(trials)] != pytest.approx(singles, abs=1e-4)


def test_only_short_documents_of_small_models_have_rows(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    longer = [np.tile(tiny.rows[0], 3)[: ROW_TOKENS + extra] for extra in (0, 1)]
    documents = {"short": tiny.rows, "edge": longer[:1], "long": longer[1:], "none": []}

    def rows() -> dict[str, int]:
        objective = ModelObjective(tiny.model, tiny.numbers, documents)
        objective.close()
        return {part: count for part, count in objective.rows.items() if documents[part]}

    assert rows() == {"short": PASS_TOKENS // len(tiny.rows[0]), "edge": PASS_TOKENS // ROW_TOKENS}
    monkeypatch.setattr("longrope_export.search.objective.ROW_PARAMETERS", 10_000)
    assert rows() == {}


def test_a_search_makes_fewer_passes_than_trials_and_finds_the_same(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = ModelObjective.measure_rows

    def counted(self: ModelObjective, trials: Pass) -> tuple[Outcome, ...]:
        sizes.append(len(trials))
        return real(self, trials)

    monkeypatch.setattr(ModelObjective, "measure_rows", counted)

    def search() -> tuple[list[int], list[float]]:
        sizes.clear()
        small = EvolutionOptions(population=8, iterations=2, mutations=4, crossovers=4, parents=4)
        config = SearchConfig(
            documents=3,
            validation_documents=2,
            strategy="evolution",
            objective="perplexity",
            evolution=small,
            budget="20",
        )
        result = search_factors(tiny.model, tiny.numbers, tiny.rows, config)
        return list(sizes), list(result.scaling.long_factor)

    together, found = search()
    monkeypatch.setattr("longrope_export.search.objective.ROW_TOKENS", 0)
    alone, same = search()
    assert found == pytest.approx(same)
    assert set(alone) == {1}
    assert sum(together) == sum(alone)
    assert len(together) < len(alone) / 3
    assert max(together) > 4


def test_workers_answer_passes_of_several_trials(tmp_path: Path) -> None:
    with Processes(ToySource(tmp_path, kills=1), 2) as executor:
        outcomes = Evaluator(executor, {SEARCH: 2}, rows=ROWS).evaluate(_asked())
    assert outcomes == [toy_outcome(trial) for trial in _asked()]
    assert all(math.isfinite(each.loss) for each in outcomes)


@pytest.mark.parametrize("rows", [{}, ROWS])
def test_an_objective_without_rows_measures_one_after_another(rows: dict[str, int]) -> None:
    class Alone:
        def measure(self, trial: Trial) -> Outcome:
            return Outcome(trial.candidate.factors[1])

    trials = _asked()
    assert Evaluator(InProcess(Alone()), {SEARCH: 2}, rows=rows).evaluate(trials) == [
        Outcome(trial.candidate.factors[1]) for trial in trials
    ]
