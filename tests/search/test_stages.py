"""The stages of a search on an objective whose optimum is known: n̂, short sets, sets in between, the best so far."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bowl import DOCUMENTS, GOAL, NUMBERS

from longrope_export.errors import LongRopeError, NumericalError, UnsupportedModelError
from longrope_export.search.config import SearchConfig
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors.local import InProcess
from longrope_export.search.long import LongResult, choose_start_tokens
from longrope_export.search.plan import Plan
from longrope_export.search.protocol import SEARCH, SHORT_SEARCH, SHORT_VALIDATION, VALIDATION, Outcome, Trial
from longrope_export.search.short import retention, search_set, search_short
from longrope_export.search.space import Candidate, closed_form
from longrope_export.search.stages import Stages

SIZES = {
    SEARCH: 3,
    VALIDATION: 2,
    "report": 2,
    SHORT_SEARCH: 4,
    SHORT_VALIDATION: 4,
    "search@512": 3,
    "validation@512": 2,
}
UNITS = {SEARCH: 1.0, VALIDATION: 1.0, "report": 1.0, SHORT_SEARCH: 0.25, SHORT_VALIDATION: 0.25, "search@512": 0.5,
         "validation@512": 0.5}  # fmt: skip
# The optimum inside the window and at 512 tokens: nearer to the original frequencies.
GOALS = {SHORT_SEARCH: 0.1 * GOAL, SHORT_VALIDATION: 0.1 * GOAL, "search@512": 0.5 * GOAL, "validation@512": 0.5 * GOAL}


class World:
    """A quadratic with another optimum for each part; `start_tokens` gives n̂'s loss by part."""

    def __init__(self, start_tokens: dict[str, dict[int, float]] | None = None, stop_after: int | None = None) -> None:
        self.start_tokens, self.stop_after, self.count = start_tokens or {}, stop_after, 0

    def measure(self, trial: Trial) -> Outcome:
        self.count += 1
        if self.count == self.stop_after:
            raise KeyboardInterrupt
        offset = np.log(trial.candidate.factors) - GOALS.get(trial.part, GOAL) - 0.01 * trial.document
        attention = math.log(trial.candidate.attention_factor)
        loss = float(offset @ offset) + attention**2
        loss += self.start_tokens.get(trial.part, {}).get(trial.candidate.start_tokens, 0.0)
        return Outcome(loss + 1.0, (*(2.0 * offset), 2.0 * attention) if trial.gradient else None)


def _evaluator(world: Any = None) -> Evaluator:
    return Evaluator(InProcess(world or World()), SIZES)


def _config(**options: Any) -> SearchConfig:
    return SearchConfig(**{"start_tokens": (0, 4, 8), "documents": DOCUMENTS, **options}).resolve(NUMBERS, "hf")


PLAN = Plan(
    evaluations=60, baseline_documents=3, steps=60, checkpoints=3, start_documents=3, short_steps=40,
    short_evaluations=0, set_steps=40, rounds=20, compare_documents=3, units=100.0,
)  # fmt: skip
BLACK_BOX = replace(
    PLAN, steps=0, short_steps=0, set_steps=0, short_evaluations=150, set_evaluations=150, evaluations=150
)


def _result(candidate: Candidate) -> LongResult:
    return LongResult(candidate, "searched", {}, {"searched": 3.0}, (), {})


@pytest.mark.parametrize(
    ("search", "validation", "present", "taken"),
    [
        ({4: -0.1}, {4: -0.1}, 0, 4),  # better on both
        ({4: -0.1}, {4: 0.1}, 0, 0),  # better on the search documents alone
        ({4: -0.1}, {}, 0, 0),  # no better on the validation documents
        ({4: -0.1}, {4: -0.0009}, 0, 0),  # better there by less than the margin
        ({4: -0.1}, {4: -0.0011}, 0, 4),  # by more
        ({16: 0.1}, {16: 0.0001}, 16, 0),  # back to none: no margin
        ({}, {4: -0.5}, 0, 0),  # a tie on the search documents
        ({}, {}, 16, 16),  # the one that the search began with wins ties
        ({16: 0.1}, {16: 0.1}, 16, 0),  # and goes where it is worse
    ],
)
def test_start_tokens_are_taken_only_where_they_are_better_on_both_parts(
    search: dict[int, float], validation: dict[int, float], present: int, taken: int
) -> None:
    world = World({SEARCH: search, VALIDATION: validation})
    start = replace(closed_form("yarn", NUMBERS), start_tokens=present)
    found, tried = choose_start_tokens(_evaluator(world), _result(start), _config(), PLAN)
    assert found.candidate == replace(start, start_tokens=taken)
    assert set(tried) == {0, 4, 8, present}
    assert ("searched, n̂ = 4" in found.validation) == (taken == 4)


@pytest.mark.parametrize("method", ["gradient", "cmaes", "evolution"])
def test_the_short_set_is_taken_only_when_it_is_better_by_the_margin(method: str) -> None:
    plan = PLAN if method == "gradient" else BLACK_BOX
    config = _config(strategy=method)
    found = search_short(_evaluator(), NUMBERS, config, plan, 1.0)
    assert found.original_perplexity is not None
    assert found.searched_perplexity is not None
    gain = 1.0 - found.searched_perplexity / found.original_perplexity
    assert gain > 0.01
    assert found.candidate.factors != (1.0,) * 8
    for margin, original in ((gain * 0.9, False), (gain * 1.1, True)):
        again = search_short(_evaluator(), NUMBERS, replace(config, short_margin=margin), plan, 1.0)
        assert (again.candidate == NUMBERS.unchanged()) == original


@pytest.mark.parametrize(("bound", "reached"), [(1.05, 1.05), (1.08, 1.08), (2.0, float(np.exp(0.1 * GOAL.max())))])
@pytest.mark.parametrize("strategy", ["evolution", "gradient", "cmaes"])
def test_the_short_bound(strategy: str, bound: float, reached: float) -> None:
    config = _config(strategy=strategy, short_bound=bound, short_margin=0.0)
    if strategy in ("gradient", "cmaes"):
        record = replace(getattr(config, strategy), constraint="paper")
        config = replace(config, **{strategy: record})
    plan = PLAN if strategy == "gradient" else BLACK_BOX
    found = search_short(_evaluator(), NUMBERS, config, plan, 1.0)
    assert max(found.candidate.factors) == pytest.approx(reached, abs=0.011 if bound < 2.0 else 0.035)


def test_the_short_set_has_the_attention_factor_that_it_must_have() -> None:
    assert search_short(_evaluator(), NUMBERS, _config(), PLAN, 1.2).candidate.attention_factor == pytest.approx(1.2)
    nothing = replace(PLAN, short_steps=0)
    assert search_short(_evaluator(), NUMBERS, _config(), nothing, 1.2).candidate == NUMBERS.unchanged(1.2)


@pytest.mark.parametrize("strategy", ["gradient", "cmaes"])
def test_the_short_set_s_attention_factor_is_learned_where_that_is_asked_for(strategy: str) -> None:
    plan = PLAN if strategy == "gradient" else BLACK_BOX
    found = search_short(_evaluator(), NUMBERS, _config(strategy=strategy, learn_short_attention=True), plan, 1.2)
    # The optimum is 1.
    assert abs(math.log(found.candidate.attention_factor)) < 0.7 * math.log(1.2)
    kept = search_short(_evaluator(), NUMBERS, _config(strategy=strategy), plan, 1.2)
    assert kept.candidate.attention_factor == pytest.approx(1.2)
    assert found.searched_perplexity
    assert kept.searched_perplexity
    assert found.searched_perplexity < kept.searched_perplexity
    # Sets in between have the short set's, whatever it is.
    config = _config(strategy=strategy, learn_short_attention=True)
    between = search_set(_evaluator(), NUMBERS, config, plan, 512, found.candidate, closed_form("yarn", NUMBERS))
    assert between.candidate.attention_factor == found.candidate.attention_factor


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({}, "gguf", "one attention factor for both sets"),
        ({"learn_attention": True}, "gguf", "one attention factor for both sets"),
        ({"learn_attention": False}, "hf", "learns the long set's"),
        ({"strategy": "evolution"}, "hf", "learns the long set's"),
        ({"strategy": "critical-dim", "optimiser": "evolution"}, "hf", "learns the long set's"),
        ({"short": "original"}, "hf", "--short search"),
    ],
)
def test_a_short_attention_factor_that_cannot_be_learned_is_refused(
    options: dict[str, Any], kind: str, words: str
) -> None:
    with pytest.raises(LongRopeError, match=words):
        SearchConfig(learn_short_attention=True, **options).resolve(NUMBERS, kind)


def test_journals_from_before_the_short_attention_factor_could_be_learned_go_on() -> None:
    assert "learn_short_attention" not in _config().to_header()
    assert _config(learn_short_attention=True).to_header()["learn_short_attention"] is True


class _Breaking(World):
    """Gradients on `part` are not finite after the first `good` ones."""

    def __init__(self, part: str, good: int) -> None:
        super().__init__()
        self.part, self.good = part, good

    def measure(self, trial: Trial) -> Outcome:
        outcome = super().measure(trial)
        if trial.gradient and trial.part == self.part:
            self.good -= 1
            return outcome if self.good >= 0 else replace(outcome, gradient=(math.inf,) * 9)
        return outcome


@pytest.mark.parametrize("strategy", ["gradient", "critical-dim"])
@pytest.mark.parametrize(
    ("part", "good", "note"),
    [
        (SEARCH, 20, "the gradient became NaN or infinite at step "),
        (SHORT_SEARCH, 12, "the short set: the gradient became NaN or infinite at step 13 of 40"),
        (SHORT_SEARCH, 0, "the short set was not searched: the gradient is NaN"),
        ("search@512", 12, "the set for 512 tokens: the gradient became NaN or infinite at step 13 of 40"),
        ("search@512", 0, "the set for 512 tokens was not searched: the gradient is NaN"),
    ],
)
def test_a_gradient_that_is_not_finite_ends_its_descent_and_not_the_search(
    strategy: str, part: str, good: int, note: str
) -> None:
    options = {"strategy": strategy, "sets": ("2x",), "critical_indices": (1, 3) if strategy != "gradient" else None}
    whole, found = (_stages(world, **options).run() for world in (World(), _Breaking(part, good)))
    assert found.complete
    assert not any("NaN" in each for each in whole.notes)
    assert any(note in each for each in found.notes)
    losses = found.validation_perplexity
    assert losses[found.chosen] == min(losses.values()) < losses["yarn"]
    assert found.short_chosen == ("original" if (part, good) == (SHORT_SEARCH, 0) else whole.short_chosen)


def test_a_first_gradient_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(NumericalError, match="the gradient is NaN or infinite; lower"):
        _stages(_Breaking(SEARCH, 0)).run()


@pytest.mark.parametrize("method", ["gradient", "cmaes", "evolution"])
def test_the_set_for_a_length_in_between_is_searched_at_that_length(method: str) -> None:
    short, long = NUMBERS.unchanged(), closed_form("yarn", NUMBERS)
    plan = PLAN if method == "gradient" else BLACK_BOX
    found = search_set(_evaluator(), NUMBERS, _config(strategy=method), plan, 512, short, long)
    assert found.chosen.startswith("searched")
    assert found.validation[found.chosen] == min(found.validation.values())
    assert {"yarn", "ntk", "pi", "critical-dim", "short", "long"} < set(found.validation)
    assert np.abs(np.log(found.candidate.factors) - 0.5 * GOAL).max() < 0.35
    assert (found.candidate.attention_factor, found.candidate.start_tokens) == (1.0, 0)


def test_retention_is_measured_unchanged_with_the_short_and_with_the_long_set() -> None:
    short, long = Candidate(tuple(np.exp(0.1 * GOAL))), closed_form("yarn", NUMBERS)
    kept = retention(_evaluator(), NUMBERS, short, long)
    expected = [
        math.exp(np.mean([World().measure(Trial(each, SHORT_VALIDATION, index)).loss for index in range(4)]))
        for each in (NUMBERS.unchanged(), short, long)
    ]
    assert list(kept) == ["unchanged", "short factors", "long factors"]
    assert list(kept.values()) == pytest.approx(expected)
    assert kept["short factors"] < kept["unchanged"] < kept["long factors"]


def _stages(world: Any, plan: Plan = PLAN, **options: Any) -> Stages:
    return Stages(_evaluator(world), NUMBERS, _config(**options), plan, {"model": "m"}, UNITS)


@pytest.mark.parametrize(
    ("strategy", "optimiser"),
    [("gradient", "gradient"), ("evolution", "gradient"), ("cmaes", "gradient"), ("critical-dim", "gradient"),
     ("critical-dim", "cmaes"), ("critical-dim", "evolution")],
)  # fmt: skip
def test_all_stages_end_in_one_record(strategy: str, optimiser: str) -> None:
    plan = PLAN if strategy in ("gradient", "critical-dim") and optimiser == "gradient" else BLACK_BOX
    world = World()
    result = _stages(world, plan, strategy=strategy, optimiser=optimiser, sets=("2x",), report_documents=2,
                     critical_indices=(1, 3) if strategy == "critical-dim" else None).run()  # fmt: skip
    assert result.complete
    assert result.scaling.sets.keys() == {512}
    assert set(result.report_perplexity) == {"unchanged", "yarn", "ntk", "pi", "critical-dim", "result"}
    # Evolution's attention factor is fixed at another one than the optimum's.
    populations = (strategy, optimiser) in (("evolution", "gradient"), ("critical-dim", "evolution"))
    assert result.report_perplexity["result"] == min(result.report_perplexity.values()) or populations
    assert result.scaling.provenance["retention"] == result.retention
    assert (set(result.scaling.provenance["critical_index_perplexity"]) == {"1", "3"}) == (strategy == "critical-dim")
    assert result.evaluations > 10


@pytest.mark.parametrize("strategy", ["gradient", "evolution", "cmaes"])
def test_a_stopped_search_has_its_best_so_far(strategy: str) -> None:
    plan = PLAN if strategy == "gradient" else BLACK_BOX
    whole = World()
    _stages(whole, plan, strategy=strategy).run()
    found: list[float] = []
    for share in (0.001, 0.2, 0.5, 0.8, 0.97):
        world = World(stop_after=max(1, round(share * whole.count)))
        stages = _stages(world, plan, strategy=strategy)
        with pytest.raises(KeyboardInterrupt):
            stages.run()
        measured = world.count
        best = stages.best_so_far()
        assert world.count == measured
        if best is None:
            assert share == 0.001
            continue
        assert not best.complete
        assert best.scaling.provenance["complete"] is False
        assert "stopped" in best.notes[0]
        found.append(float(((np.log(best.scaling.long_factor) - GOAL) ** 2).sum()))
    assert len(found) == 4
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * found[0] or strategy == "evolution"


@pytest.mark.parametrize(("init", "name"), [(np.exp(GOAL), "init"), (np.ones(8), "yarn")])
@pytest.mark.parametrize("strategy", ["gradient", "cmaes"])
def test_the_best_so_far_has_the_name_that_the_result_would_give_it(strategy: str, init: Any, name: str) -> None:
    # Ctrl-C once the four closed forms and the init were measured on the two validation documents.
    world = World(stop_after=11)
    plan = PLAN if strategy == "gradient" else BLACK_BOX
    given = Candidate(tuple(init.tolist()))
    stages = Stages(_evaluator(world), NUMBERS, _config(strategy=strategy), plan, {"model": "m"}, UNITS, given)
    with pytest.raises(KeyboardInterrupt):
        stages.run()
    best = stages.best_so_far()
    assert best
    assert (best.chosen, list(best.validation_perplexity)) == (name, [name])


def test_a_model_that_ignores_its_factors_is_refused_by_every_strategy() -> None:
    class Deaf:
        def measure(self, trial: Trial) -> Outcome:
            return Outcome(1.0, (0.0,) * 9 if trial.gradient else None)

    for strategy in ("gradient", "evolution", "cmaes"):
        with pytest.raises(UnsupportedModelError, match="the same loss"):
            _stages(Deaf(), PLAN, strategy=strategy).run()


@pytest.mark.parametrize(
    ("options", "word"),
    [({"sets_share": 0.0}, "sets share"), ({"sets": ("2x",) * 9}, "sets share"), ({"short_bound": 1.0}, "short bound"),
     ({"report_documents": -1}, "report documents"), ({"objective": "loss"}, "objective"),
     ({"optimiser": "random"}, "optimiser")],
)  # fmt: skip
def test_impossible_configurations_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(LongRopeError, match=word):
        SearchConfig(**options)


def test_what_depends_on_the_target_is_refused_there() -> None:
    with pytest.raises(LongRopeError, match="holds no sets"):
        SearchConfig(sets=("2x",)).resolve(NUMBERS, "gguf")
    with pytest.raises(LongRopeError, match="critical index is 8"):
        SearchConfig(strategy="critical-dim", critical_indices=(8,)).resolve(NUMBERS, "hf")
    assert SearchConfig(strategy="cmaes").resolve(NUMBERS, "hf").race
    assert not SearchConfig(strategy="evolution").resolve(NUMBERS, "hf").race
    assert SearchConfig(strategy="evolution", race=True).resolve(NUMBERS, "hf").race
