"""Racing: who is dropped, on what evidence, and what it saves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from longrope_export.search.protocol import SEARCH, Outcome
from longrope_export.search.space import Candidate
from longrope_export.search.strategies.racing import Race, mean_loss


def _run(table: Sequence[Sequence[float]], *, keep: int = 1, eliminate: bool = True, incumbents: object = ()) -> Race:
    """A race of candidates whose losses by document are the rows of `table`."""
    candidates = [Candidate((1.0, 2.0 + index)) for index in range(len(table))]
    race = Race(
        candidates, SEARCH, len(table[0]), eliminate=eliminate, keep=keep, incumbents=incumbents  # type: ignore[arg-type]
    )  # fmt: skip
    while trials := race.ask():
        race.tell([Outcome(table[candidates.index(trial.candidate)][trial.document]) for trial in trials])
    return race


def _documents(race: Race) -> list[int]:
    return [len(losses) for losses in race.losses]


def test_without_elimination_everything_is_asked_at_once_in_candidate_and_document_order() -> None:
    candidates = [Candidate((1.0, value)) for value in (2.0, 3.0)]
    trials = Race(candidates, SEARCH, 3).ask()
    assert [(trial.candidate, trial.document) for trial in trials] == [
        (each, index) for each in candidates for index in range(3)
    ]
    assert _documents(_run([[1.0] * 5, [9.0] * 5], eliminate=False)) == [5, 5]


def test_a_clear_loser_is_dropped_although_the_documents_differ_much_more() -> None:
    # Documents from 1 to 9 nats apart, candidates 0.2 apart: only paired differences show it.
    hard = np.array([1.0, 9.0, 4.0, 6.0, 2.0])
    race = _run([hard, hard + 0.2 + [0.01, -0.01, 0.01, 0.0, 0.0]])
    assert _documents(race) == [5, 2]
    assert [index for index, _ in race.survivors()] == [0]


def test_a_difference_within_the_noise_drops_nobody() -> None:
    noise = np.array([0.3, -0.3, 0.25, -0.2, 0.1])
    assert _documents(_run([np.ones(5), 1.02 + noise])) == [5, 5]


@pytest.mark.parametrize(("keep", "dropped"), [(1, 3), (2, 2), (3, 1), (4, 0)])
def test_the_best_that_will_be_kept_stay(keep: int, dropped: int) -> None:
    table = [[value, value + 0.001, value, value] for value in (1.0, 2.0, 3.0, 4.0)]
    race = _run(table, keep=keep)
    assert _documents(race).count(2) == dropped
    assert [index for index, _ in race.survivors()] == list(range(4 - dropped))


def test_earlier_candidates_count_by_their_losses_on_the_same_documents() -> None:
    table = [[2.0, 2.001, 2.0], [3.0, 3.0, 3.001]]
    assert _documents(_run(table, keep=2)) == [3, 3]
    assert _documents(_run(table, keep=2, incumbents=[[1.0] * 3, [1.1] * 3])) == [2, 2]
    assert _documents(_run(table, keep=2, incumbents=[[1.0] * 3])) == [3, 2]


def test_a_loss_that_is_not_finite_drops_its_candidate() -> None:
    race = _run([[1.0, 1.1, 1.0], [math.inf, 1.0, 1.0]])
    assert _documents(race) == [3, 2]
    assert race.ranking()[1] == math.inf


def test_the_ranking_has_survivors_by_mean_and_then_the_dropped_by_their_gap() -> None:
    race = _run([[15.0] * 4, [11.0] * 4, [11.2, 11.0, 11.1, 11.3], [13.0, 13.1, 13.0, 13.0]], keep=2)
    assert _documents(race) == [2, 4, 4, 2]
    assert np.argsort(race.ranking()).tolist() == [1, 2, 3, 0]


@pytest.mark.parametrize("documents", [1, 2])
def test_one_or_two_documents_are_measured_whole(documents: int) -> None:
    assert _documents(_run([[1.0] * documents, [9.0] * documents])) == [documents] * 2


def test_means() -> None:
    assert mean_loss([1.0, 2.0]) == 1.5
    assert mean_loss([1.0, math.inf]) == mean_loss([]) == math.inf
