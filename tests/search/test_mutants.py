"""Checks of the checks: each part of a search is broken in one place, and a check that holds without it must fail."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import bowl
import numpy as np
import pytest
import torch
from bowl import NUMBERS
from toy_objective import ToySource, toy_outcome

from longrope_export.errors import LongRopeError
from longrope_export.search import config, documents, factors, mixture, short
from longrope_export.search.config import SearchConfig
from longrope_export.search.documents import REPORT
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors import InProcess, Processes
from longrope_export.search.factors import search_parts
from longrope_export.search.journal import Journal
from longrope_export.search.long import LongSearch
from longrope_export.search.objective import ModelObjective
from longrope_export.search.plan import Plan
from longrope_export.search.protocol import SEARCH, VALIDATION, Outcome, Pass, Trial
from longrope_export.search.short import search_short
from longrope_export.search.space import Candidate
from longrope_export.search.strategies import gradient, racing
from longrope_export.search.strategies.evolution import EvolutionOptions

HERE = Path(__file__).parent
# What a failing check raises; anything else means that the mutant or the call of the check is wrong.
CAUGHT = (AssertionError, LongRopeError, pytest.fail.Exception)
SMALL: Mapping[str, Any] = {
    "strategy": "evolution", "budget": "12", "documents": 2, "validation_documents": 1, "short": "original",
    "evolution": EvolutionOptions(population=4, iterations=2, mutations=2, crossovers=2, parents=2),
}  # fmt: skip

Check = Callable[[Any, Any, Path, pytest.MonkeyPatch], object]
Mutant = Callable[[pytest.MonkeyPatch], None]


def _test(file: str, name: str, **arguments: Any) -> Check:
    """A test of another file of this folder as a check: it gets the fixtures that it names, and `arguments`."""

    def check(tiny: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
        fixtures = {"tiny": tiny, "tiny_tokenizer": tiny_tokenizer, "tmp_path": tmp_path, "monkeypatch": monkeypatch}
        test = getattr(_loaded(file), name)
        wanted = inspect.signature(test).parameters
        return test(**{each: value for each, value in fixtures.items() if each in wanted} | arguments)

    return check


def _loaded(file: str) -> ModuleType:
    # Executed anew, so that it imports what is broken now.
    spec = importlib.util.spec_from_file_location(f"mutants_{file}", HERE / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _parts_are_disjoint(tiny: Any, *_: object) -> None:
    """No document, and no piece of one, is searched on and chosen or reported on."""
    config = SearchConfig(documents=3, validation_documents=2, report_documents=2, sets=("2x",), early_length="3x")
    parts = search_parts(tiny.rows, tiny.numbers, config.resolve(tiny.numbers, "hf"), 1)
    rows = [{bytes(row) for row in tiny.rows[first:last]} for first, last in ((0, 3), (3, 5), (5, 7))]
    for kind, own in zip((SEARCH, VALIDATION, REPORT), rows):
        names = [name for name in parts if kind in name]
        assert names
        for piece in (piece for name in names for document in parts[name] for piece in document):
            body = bytes(piece.token_ids[1:])
            assert any(body in row for row in own)
            assert not any(body in row for others in rows if others is not own for row in others)


def _the_original_set_wins_ties(*_: object) -> None:
    """A short set that moved away and is exactly as good does not replace the original frequencies."""

    class Flat:
        def measure(self, trial: Trial) -> Outcome:
            return Outcome(1.0, (0.5,) * 9 if trial.gradient else None)

    sizes = dict.fromkeys(("search", "validation", "short-search", "short-validation"), 2)
    config = SearchConfig(short_margin=0.0).resolve(NUMBERS, "hf")
    plan = Plan(
        evaluations=0, baseline_documents=2, steps=8, checkpoints=1, start_documents=0, short_steps=8, units=1.0
    )  # fmt: skip
    found = search_short(Evaluator(InProcess(Flat()), sizes), NUMBERS, config, plan, 1.0)
    assert found.searched_perplexity == found.original_perplexity
    assert found.candidate == NUMBERS.unchanged()


def _processes_answer_by_trial(_: Any, __: Any, tmp_path: Path, ___: Any) -> None:
    folder = tmp_path / "notes"
    folder.mkdir(exist_ok=True)
    trials = [Trial(Candidate((1.0, 2.0)), SEARCH, document) for document in range(3)]
    with Processes(ToySource(folder, slow_first=0.3), 2) as executor:
        evaluator = Evaluator(executor, {SEARCH: 3})
        assert evaluator.evaluate(trials) == [toy_outcome(trial) for trial in trials]


def _an_evaluation_is_in_the_journal_once(tiny: Any, _: Any, tmp_path: Path, __: Any) -> None:
    """Every distinct trial has one line, also when it is asked for twice."""
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
    objective = ModelObjective(tiny.model, tiny.numbers, {SEARCH: tiny.rows[:2]})
    with Journal(path) as journal:
        evaluator = Evaluator(InProcess(objective), {SEARCH: 2}, journal)
        for _again in range(2):
            evaluator.mean_losses([tiny.numbers.unchanged()], SEARCH)
    objective.close()
    assert path.read_bytes().count(b"\n") == 2


def _forget_the_journal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Evaluator, "_recorded", lambda self, number, trial: None)


def _forget_what_is_known(patch: pytest.MonkeyPatch) -> None:
    original = Evaluator.evaluate

    def evaluate(self: Any, trials: Sequence[Trial]) -> list[Outcome]:
        self._known.clear()
        return original(self, trials)

    patch.setattr(Evaluator, "evaluate", evaluate)


def _another_generator_each_time(patch: pytest.MonkeyPatch) -> None:
    real, count = np.random.default_rng, itertools.count()
    patch.setattr(np.random, "default_rng", lambda seed=None: real((next(count), 7)))


def _overlapping(module: ModuleType, patch: pytest.MonkeyPatch) -> None:
    real = documents.split_rows

    def split(*rows: Any, **options: Any) -> Any:
        parts = real(*rows, **options)
        return parts | {VALIDATION: (parts[SEARCH][-1], *parts[VALIDATION][1:])}

    patch.setattr(module, "split_rows", split)


def _short_pieces_from_everywhere(patch: pytest.MonkeyPatch) -> None:
    real = factors.split_rows

    def split(*rows: Any, **options: Any) -> Any:
        parts = real(*rows, **options)
        return parts | {"short-search": parts["short-search"] + parts["short-validation"][:1]}

    patch.setattr(factors, "split_rows", split)


def _validation_is_the_search(patch: pytest.MonkeyPatch) -> None:
    real = Evaluator.mean_losses
    patch.setattr(
        Evaluator, "mean_losses", lambda self, candidates, part, *count: real(self, candidates, SEARCH, *count)
    )


def _the_best_are_dropped(patch: pytest.MonkeyPatch) -> None:
    real = racing.paired_gaps

    def gaps(table: Any, reference: Any) -> Any:
        found, error = real(table, reference)
        return -found, error

    patch.setattr(racing, "paired_gaps", gaps)


class _Lax(float):
    """A perplexity that calls itself lower where it is equal."""

    def __lt__(self, other: float) -> bool:
        return float(self) <= other

    def __mul__(self, other: float) -> float:
        return float(self) * other


def _ties_are_won(patch: pytest.MonkeyPatch) -> None:
    real = short.perplexity
    patch.setattr(short, "perplexity", lambda loss: _Lax(real(loss)))


def _in_order_of_arrival(executor: Any, patch: pytest.MonkeyPatch) -> None:
    real = executor.run

    def run(self: Any, passes: Sequence[Pass]) -> Iterator[tuple[int, Sequence[Outcome]]]:
        return enumerate(outcomes for _, outcomes in real(self, passes))

    patch.setattr(executor, "run", run)


def _uphill(patch: pytest.MonkeyPatch) -> None:
    real = ModelObjective._gradient

    def negative(self: Any, *arguments: Any) -> tuple[float, list[float]]:
        loss, slope = real(self, *arguments)
        return loss, [-value for value in slope]

    patch.setattr(ModelObjective, "_gradient", negative)


def _adam_goes_uphill(patch: pytest.MonkeyPatch) -> None:
    real = gradient._Adam.direction
    patch.setattr(gradient._Adam, "direction", lambda self, slope: -real(self, slope))


def _no_attention_gradient(patch: pytest.MonkeyPatch) -> None:
    real = ModelObjective._apply

    def apply(self: Any, candidate: Candidate, offsets: Any = None) -> None:
        kept = None if offsets is None else torch.cat([offsets[:-1], offsets[-1:].detach()])
        real(self, candidate, kept)

    patch.setattr(ModelObjective, "_apply", apply)


def _answers_off_by_one(patch: pytest.MonkeyPatch) -> None:
    real = mixture.needle_piece

    def shifted(*arguments: Any) -> mixture.Piece:
        piece = real(*arguments)
        return mixture.Piece(piece.token_ids, np.roll(piece.weights, -1))

    patch.setattr(mixture, "needle_piece", shifted)


def _one_depth(patch: pytest.MonkeyPatch) -> None:
    real = mixture.needle_piece
    patch.setattr(
        mixture, "needle_piece", lambda row, tokenizer, key, depth, *rest: real(row, tokenizer, key, 0.5, *rest)
    )


def _answers_cut_off(patch: pytest.MonkeyPatch) -> None:
    """The needle's document is built longer than the window and cut to it, as LongRoPE2's script does."""
    real = mixture.needle_piece

    def cut(row: Any, *rest: Any) -> mixture.Piece:
        piece = real(np.concatenate([row, row[-5:]]), *rest)
        return mixture.Piece(piece.token_ids[: len(row)], piece.weights[: len(row) - 1])

    patch.setattr(mixture, "needle_piece", cut)


def _one_document(patch: pytest.MonkeyPatch) -> None:
    """The needles stand at all depths of the first document, as in LongRoPE2's first ten rows."""
    real = mixture.Mixture.documents
    patch.setattr(mixture.Mixture, "documents", lambda self, rows, *rest: real(self, [rows[0] for _ in rows], *rest))


def _no_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(mixture, "_weight", lambda text, value: 1.0)


def _start_tokens_for_a_gguf(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(config, "_check_gguf", lambda *_: None)
    patch.setattr(SearchConfig, "_start_tokens", lambda self, runtime, numbers: (0, 4, 16))


def _attention_for_a_gguf(patch: pytest.MonkeyPatch) -> None:
    real = config._default_attention
    patch.setattr(config, "_default_attention", lambda runtime, method: real("hf", method))


def _learned_attention_for_a_gguf(patch: pytest.MonkeyPatch) -> None:
    real = SearchConfig.resolve
    patch.setattr(SearchConfig, "resolve", lambda self, *rest: replace(real(self, *rest), learn_attention=True))


def _swapped_retention(patch: pytest.MonkeyPatch) -> None:
    real = short.retention
    patch.setattr(short, "retention", lambda evaluator, numbers, first, second: real(evaluator, numbers, second, first))


def _early_shift_times(factor: float, patch: pytest.MonkeyPatch) -> None:
    real = LongSearch._early_shift
    patch.setattr(LongSearch, "_early_shift", lambda self, name: tuple(factor * value for value in real(self, name)))


def _without_init(patch: pytest.MonkeyPatch) -> None:
    real = LongSearch._phase
    patch.setattr(LongSearch, "_phase", lambda self, start, *rest: real(self, self.closed_forms["yarn"], *rest))


FINITE_DIFFERENCE = _test("test_objective", "test_the_gradient_is_the_finite_difference", start_tokens=0)
START_TOKENS = _test(
    "test_stages", "test_start_tokens_are_taken_only_where_they_are_better_on_both_parts",
    search={4: -0.1}, validation={4: 0.1}, present=0, taken=0,
)  # fmt: skip
DISJOINT_ROWS = _test("test_search_factors", "test_search_and_validation_rows_are_disjoint_and_the_short_pieces_too")


def _finished(name: str) -> Check:
    """A test of `test_search_factors` that begins with a finished search, which the same mutant has broken."""

    def check(tiny: Any, _: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
        module, path = _loaded("test_search_factors"), tmp_path / "first.jsonl"
        module.NAMED["small"] = SMALL
        done = module._run(tiny, path, **SMALL), path.read_bytes()
        given = {
            "tiny": tiny, "tmp_path": tmp_path, "monkeypatch": monkeypatch, "name": "small",
            "done": lambda name: done, "journal": lambda name: path,
        }  # fmt: skip
        test = getattr(module, name)
        return test(**{each: given[each] for each in inspect.signature(test).parameters})

    return check


REPLAY = _finished("test_a_finished_journal_is_replayed_without_measuring")
RESUME = _finished("test_a_journal_cut_anywhere_ends_in_the_same_record")
RACE = _test("test_racing", "test_the_best_that_will_be_kept_stay", keep=2, dropped=2)
OPTIMUM = _test("test_strategies", "test_the_descent_reaches_the_optimum_and_learns_the_attention_factor")
NEEDLE = _test("test_mixture", "test_a_needle_is_answered_at_the_end_and_only_the_answer_counts")
DEPTHS = _test("test_mixture", "test_depths_are_stratified_over_distinct_documents_with_distinct_keys")


WEIGHTS = _test("test_mixture", "test_text_and_answer_are_scored_in_one_pass")
GGUF = _test("test_search_factors", "test_a_gguf_search_finds_only_what_a_gguf_holds")
RETENTION = _test("test_stages", "test_retention_is_measured_unchanged_with_the_short_and_with_the_long_set")
EARLY = _test("test_starts", "test_early_steps_begin_at_the_same_structure_for_the_early_length", begins="yarn")
POLISHING = _test("test_starts", "test_cmaes_polishes_its_init")


def _arrival(tiny: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strategies = _loaded("test_strategies")
    strategies.test_the_result_does_not_depend_on_the_order_of_arrival(strategies._evolution)


MUTANTS: Mapping[str, tuple[Check, Mutant]] = {
    "the journal is not looked at": (REPLAY, _forget_the_journal),
    "a trial is measured again": (_an_evaluation_is_in_the_journal_once, _forget_what_is_known),
    "a resumed search draws other numbers": (RESUME, _another_generator_each_time),
    "a document is searched and validated on": (DISJOINT_ROWS, partial(_overlapping, documents)),
    "a search's document is searched and validated on": (_parts_are_disjoint, partial(_overlapping, factors)),
    "the short search sees validation text": (_parts_are_disjoint, _short_pieces_from_everywhere),
    "start tokens are chosen on the search documents": (START_TOKENS, _validation_is_the_search),
    "racing drops the best": (RACE, _the_best_are_dropped),
    "the short set wins ties": (_the_original_set_wins_ties, _ties_are_won),
    "outcomes in the order of arrival": (_arrival, partial(_in_order_of_arrival, bowl.LastFirst)),
    "processes answer in the order of arrival": (_processes_answer_by_trial, partial(_in_order_of_arrival, Processes)),
    "the gradient has the wrong sign": (FINITE_DIFFERENCE, _uphill),
    "the descent goes uphill": (OPTIMUM, _adam_goes_uphill),
    "the attention factor's gradient is dropped": (FINITE_DIFFERENCE, _no_attention_gradient),
    "the needle's answer is off by one": (NEEDLE, _answers_off_by_one),
    "all needles at one depth": (DEPTHS, _one_depth),
    "all needles in one document": (DEPTHS, _one_document),
    "the needle's answer is cut off": (NEEDLE, _answers_cut_off),
    "the objective's weights are ignored": (WEIGHTS, _no_weights),
    "start tokens for a GGUF": (GGUF, _start_tokens_for_a_gguf),
    "an attention factor for a GGUF": (GGUF, _attention_for_a_gguf),
    "a learned attention factor for a GGUF": (GGUF, _learned_attention_for_a_gguf),
    "what the window keeps, with the sets swapped": (RETENTION, _swapped_retention),
    "early steps without their shift": (EARLY, partial(_early_shift_times, 0.0)),
    "early steps shifted the other way": (EARLY, partial(_early_shift_times, -1.0)),
    "cmaes begins at a closed form instead of its init": (POLISHING, _without_init),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(
    name: str, tiny: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check, mutate = MUTANTS[name]
    for folder in ("whole", "broken"):
        (tmp_path / folder).mkdir()
    with monkeypatch.context() as patch:
        check(tiny, tiny_tokenizer, tmp_path / "whole", patch)
    mutate(monkeypatch)
    with pytest.raises(CAUGHT), monkeypatch.context() as patch:
        check(tiny, tiny_tokenizer, tmp_path / "broken", patch)
