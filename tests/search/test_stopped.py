"""Ctrl-C while a search goes through its journal again: the record that is there already is further on, and stays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from longrope_export.scaling import RopeScaling
from longrope_export.search.plan import Plan
from longrope_export.search.protocol import Outcome, Trial
from longrope_export.search.run import SearchConfig, SearchStopped, run_search

Search = Callable[..., Path]


class _Stop:
    """Ctrl-C at the outcome after the first `count`."""

    def __init__(self, count: int) -> None:
        self.count, self.left = count, count

    def plan(self, plan: Plan, sizes: Mapping[str, int], units: Mapping[str, float]) -> None:
        """Nothing to show."""

    def observe(self, trial: Trial, outcome: Outcome, measured_now: bool) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.fixture
def search(tiny_folder: Path, text: Path, tmp_path: Path) -> Search:
    def run(after: int | None = None, out: Path = tmp_path / "out", **options: Any) -> Path:
        config = SearchConfig(
            model=tiny_folder, target="4x", data=(text,), out=out, budget="30", documents=2, threads=1, **options
        )
        if after is None:
            run_search(config)
        else:
            with pytest.raises(SearchStopped):
                run_search(config, _Stop(after))
        return out / "longrope.json"

    return run


def _complete(record: Path) -> Any:
    return RopeScaling.from_json(record.read_text()).provenance["complete"]


def test_a_complete_record_is_not_overwritten_by_a_partial_one(search: Search) -> None:
    record = search()
    before = record.read_bytes()
    for after in (12, 30, 50):
        assert search(after).read_bytes() == before
    assert _complete(record)


def test_the_further_of_two_partial_records_stays_and_a_further_one_replaces_it(search: Search) -> None:
    record = search(40)
    before = record.read_bytes()
    assert not _complete(record)
    assert search(12).read_bytes() == before
    assert search(55).read_bytes() != before
    assert not _complete(record)
    search()
    assert _complete(record)


def test_another_search_s_record_or_none_at_all_is_overwritten(search: Search, tmp_path: Path) -> None:
    other = search(out=tmp_path / "other", seed=1)
    assert _complete(other)
    record = search(40)
    for broken in (other.read_text(), "{}"):
        record.write_text(broken)
        search(20)
        assert not _complete(record)
        assert RopeScaling.from_json(record.read_text()).provenance["seed"] == 0
