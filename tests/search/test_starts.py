"""Where a search begins: at a record, carried from another length or not, and what early steps make of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export.errors import ScalingError, StaleStateError
from longrope_export.search.factors import SearchResult, search_factors
from longrope_export.search.initial import read_init
from longrope_export.search.run import SearchConfig
from longrope_export.search.space import Candidate, closed_form
from longrope_export.search.strategies.cmaes import CmaOptions

GRADIENT: dict[str, Any] = {"budget": "40", "documents": 2, "validation_documents": 2, "short_share": 0.1}
CMAES: dict[str, Any] = {"strategy": "cmaes", "budget": "48", "documents": 3, "validation_documents": 2}


def _run(tiny: Any, journal: Path | None = None, **options: Any) -> SearchResult:
    return search_factors(tiny.model, tiny.numbers, tiny.rows, SearchConfig(**options), journal)


def _trials(path: Path) -> list[Any]:
    return [json.loads(line)["of"] for line in path.read_text().splitlines()[1:]]


def test_init_is_where_the_descent_begins(tiny: Any, tmp_path: Path) -> None:
    given = Candidate(tuple(np.linspace(1.0, 3.0, 16).tolist()), 1.07)
    record = tmp_path / "init.json"
    record.write_text(tiny.numbers.record(given, tiny.numbers.unchanged(), {}).to_json())
    result = _run(tiny, tmp_path / "journal.jsonl", **GRADIENT, init=record)
    trials = _trials(tmp_path / "journal.jsonl")
    first_step = next(trial for trial in trials if trial[2])
    np.testing.assert_allclose(first_step[3][0], given.factors, rtol=1e-6)
    assert first_step[3][1] == pytest.approx(1.07)
    assert "init" in result.validation_perplexity
    with pytest.raises(StaleStateError, match=": init is "):
        _run(tiny, tmp_path / "journal.jsonl", **GRADIENT)


def test_cmaes_polishes_its_init(tiny: Any, tmp_path: Path) -> None:
    # The first generation lies around it, as close as sigma says.
    given = Candidate(tuple(np.linspace(1.0, 3.0, 16).tolist()), 1.07)
    record = tmp_path / "init.json"
    record.write_text(tiny.numbers.record(given, tiny.numbers.unchanged(), {}).to_json())
    _run(tiny, tmp_path / "journal.jsonl", **CMAES, init=record, cmaes=CmaOptions(sigma=1e-3))
    searched = [trial[3] for trial in _trials(tmp_path / "journal.jsonl") if trial[0] == "search"]
    first = list(dict.fromkeys((tuple(factors), attention) for factors, attention, _ in searched))[: 1 + 12]
    assert first[0] == (given.factors, given.attention_factor)
    logs = np.log([factors for factors, _ in first[1:]])
    np.testing.assert_allclose(logs.mean(axis=0), np.log(given.factors), atol=1.5e-3)
    assert np.ptp(logs, axis=0).max() > 1e-3
    assert np.mean([attention for _, attention in first[1:]]) == pytest.approx(1.07, abs=1e-3)
    # What beats it is next to it.
    assert max(abs(np.log(factors) - np.log(given.factors)).max() for factors, _ in first) < 5e-3


@pytest.mark.parametrize("begins", ["yarn", "init"])
def test_early_steps_begin_at_the_same_structure_for_the_early_length(tiny: Any, tmp_path: Path, begins: str) -> None:
    """YaRN for the early length; of an init, what it adds to YaRN's log λ and log m."""
    early = replace(tiny.numbers, target=2 * tiny.numbers.window)
    there, here = (closed_form("yarn", numbers) for numbers in (early, tiny.numbers))
    options, given = {**GRADIENT, "baselines": ("yarn",), "early_length": "2x"}, here
    if begins == "init":
        given = Candidate(tuple(np.linspace(1.0, 3.0, 16).tolist()), 1.07)
        options["init"] = tmp_path / "init.json"
        options["init"].write_text(tiny.numbers.record(given, tiny.numbers.unchanged(), {}).to_json())
    _run(tiny, tmp_path / "journal.jsonl", **options)
    first = next(trial for trial in _trials(tmp_path / "journal.jsonl") if trial[2])
    assert first[0] == "early-search@64"
    shift = np.log(there.factors) - np.log(here.factors)
    assert (shift.min(), shift.max()) == (pytest.approx(-np.log(2)), 0.0)
    np.testing.assert_allclose(np.log(first[3][0]), np.log(given.factors) + shift, atol=1e-6)
    assert here.attention_factor > 1.05 * there.attention_factor
    ratio = there.attention_factor / here.attention_factor
    assert first[3][1] == pytest.approx(given.attention_factor * ratio, rel=1e-6)


def test_init_for_another_length_is_carried_by_its_deviation_from_yarn(tiny: Any, tmp_path: Path) -> None:
    half = replace(tiny.numbers, target=tiny.numbers.target // 2)
    there, here = (closed_form("yarn", numbers) for numbers in (half, tiny.numbers))
    given = Candidate(tuple(np.linspace(1.0, 2.0, 16).tolist()), 1.03)
    record = tmp_path / "init.json"
    record.write_text(half.record(given, half.unchanged(), {}).to_json())
    config = SearchConfig(**GRADIENT, init=record, attention="method")
    carried = read_init(config, tiny.numbers)
    assert carried
    assert read_init(config, half) == given
    np.testing.assert_allclose(
        np.log(carried.factors) - np.log(here.factors), np.log(given.factors) - np.log(there.factors), atol=1e-6
    )
    assert carried.attention_factor / here.attention_factor == pytest.approx(1.03 / there.attention_factor)
    # An attention factor that is asked for is kept.
    asked = read_init(replace(config, attention="1.2"), tiny.numbers)
    assert asked
    assert asked.attention_factor == pytest.approx(1.2)


def test_init_of_another_base_is_refused(tiny: Any, tmp_path: Path) -> None:
    other = replace(tiny.numbers, rope_theta=500000.0)
    record = tmp_path / "init.json"
    record.write_text(other.record(other.unchanged(), other.unchanged(), {}).to_json())
    with pytest.raises(ScalingError, match="base of 500000"):
        _run(tiny, **GRADIENT, init=record)
