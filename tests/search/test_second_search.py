"""A second search, on a model that carries a first one's factors: the last step of LongRoPE's progressive extension."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from longrope_export.description import describe
from longrope_export.errors import LongRopeError, ScalingError
from longrope_export.evaluation.losses import token_losses
from longrope_export.loader import load
from longrope_export.scaling import RopeScaling, to_float32
from longrope_export.search.objective import ModelObjective
from longrope_export.search.protocol import SEARCH, Trial
from longrope_export.search.run import SearchConfig, numbers_of, run_search
from longrope_export.search.space import Candidate, closed_form
from longrope_export.search.strategies.gradient import GradientOptions

WINDOW, TUNED, TARGET = 32, 64, 256
LONG = tuple(to_float32(value) for value in np.geomspace(1.0, 3.0, 16))
SHORT = tuple(to_float32(value) for value in np.geomspace(1.0, 1.3, 16))


def _record(**changes: object) -> RopeScaling:
    values = {
        "rope_theta": 10000.0, "rotary_dim": 32, "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": TUNED, "long_factor": LONG, "short_factor": SHORT, "long_attention_factor": 1.1,
    }  # fmt: skip
    return RopeScaling(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tuned(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, extended once from 32 to 64 tokens."""
    return _with(tiny_folder, tmp_path_factory.mktemp("tuned") / "tuned", _record())


def _with(source: Path, folder: Path, record: RopeScaling) -> Path:
    shutil.copytree(source, folder)
    model = load(folder, scaling=record)
    model.config.save_pretrained(folder)
    return folder


def _search(model: Path, text: Path, out: Path, **changes: object) -> RopeScaling:
    options = {
        "budget": "30", "documents": 2, "validation_documents": 1, "threads": 1, "baselines": ("yarn", "ntk"), **changes,
    }  # fmt: skip
    return run_search(SearchConfig(model=model, target="4x", data=(text,), out=out, **options)).scaling  # type: ignore[arg-type]


def test_the_long_factors_are_multiplied_and_the_short_ones_stay(tuned: Path, text: Path, tmp_path: Path) -> None:
    record = _search(tuned, text, tmp_path / "out", short="original")
    assert (record.original_max_position_embeddings, record.max_position_embeddings) == (WINDOW, TARGET)
    assert (record.short_factor, record.short_attention_factor) == (SHORT, 1.0)
    assert all(now > 0.9 * before for now, before in zip(record.long_factor, LONG, strict=True))
    assert record.long_factor[-1] > 1.3 * LONG[-1]
    journal = (tmp_path / "out" / "journal.jsonl").read_text().splitlines()
    assert json.loads(journal[0])["window"] == TUNED
    # Closed forms stretch the tuned window, not the first one.
    stretched = closed_form("yarn", numbers_of(describe(tuned), "4x"))
    assert max(stretched.factors) == pytest.approx(TARGET / TUNED, rel=0.01)


def test_short_prompts_are_searched_at_the_first_window(tuned: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = _search(tuned, text, out, short="search", budget="90")
    trials = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()[1:]]
    short = [trial for trial in trials if trial["of"][0].startswith("short")]
    assert short
    retention = record.provenance["retention"]
    ids = torch.tensor([load_ids(tuned, text, WINDOW)])
    # The model as it stands answers short prompts with its short set.
    assert retention["unchanged"] == pytest.approx(_perplexity(tuned, ids), rel=0.25)
    assert retention["unchanged"] != pytest.approx(retention["long factors"], rel=1e-4)


def load_ids(folder: Path, text: Path, count: int) -> list[int]:
    """The first tokens of the text."""
    from longrope_export.evaluation.documents import load_tokenizer

    ids: list[int] = load_tokenizer(folder)(text.read_text())["input_ids"][:count]
    return ids


def _perplexity(folder: Path, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return math.exp(token_losses(load(folder), ids).mean().item())


def test_what_is_measured_is_what_the_model_computes(tuned: Path) -> None:
    numbers = numbers_of(describe(tuned), "4x")
    ids = np.random.default_rng(0).integers(3, 97, TARGET)
    short = ids[:WINDOW]
    model = load(tuned)
    with torch.no_grad():
        wanted = [token_losses(model, torch.from_numpy(row)[None]).mean().item() for row in (ids, short)]
    objective = ModelObjective(load(tuned), numbers, {SEARCH: [ids, short]})
    measured = [
        objective.measure(Trial(candidate, SEARCH, index)).loss
        for index, candidate in enumerate((numbers.unchanged(), numbers.short_original()))
    ]
    assert measured == pytest.approx(wanted, abs=2e-6)
    swapped = objective.measure(Trial(numbers.unchanged(), SEARCH, 1)).loss
    assert abs(swapped - wanted[1]) > 1e-4


def test_one_attention_factor_for_a_gguf_is_the_total_one(tuned: Path, text: Path, tmp_path: Path) -> None:
    record = _search(tuned, text, tmp_path / "out", runtime="gguf", attention="1.0", short="original")
    assert record.short_attention_factor == record.long_attention_factor == to_float32(1.1)


def test_the_short_set_of_the_record_is_the_model_s_to_the_last_bit(tuned: Path) -> None:
    numbers = numbers_of(describe(tuned), "4x")
    kept = numbers.record(closed_form("pi", numbers), numbers.short_original(), {})
    assert kept.short_factor == SHORT
    assert kept.long_factor == pytest.approx([TARGET / TUNED * value for value in LONG])
    moved = numbers.short_original()
    moved = Candidate(tuple(1.01 * value for value in moved.factors), moved.attention_factor)
    assert numbers.record(numbers.unchanged(), moved, {}).short_factor == pytest.approx([1.01 * each for each in SHORT])


def test_start_tokens_of_the_first_search_stay_candidates(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    folder = _with(tiny_folder, tmp_path / "tuned", _record(long_start_tokens=4))
    numbers = numbers_of(describe(folder), "4x")
    assert (numbers.unchanged().start_tokens, closed_form("yarn", numbers).start_tokens) == (4, 4)
    assert numbers.short_original().start_tokens == 0
    with pytest.raises(LongRopeError, match="4 start tokens, which a GGUF cannot hold"):
        _search(folder, text, tmp_path / "out", runtime="gguf")
    assert not (tmp_path / "out" / "longrope.json").exists()


@pytest.fixture(scope="module")
def long_set(tuned: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RopeScaling, Path]:
    """A search of the long set alone, and its file."""
    out = tmp_path_factory.mktemp("long") / "out"
    return _search(tuned, text, out, short="original", start_tokens=(0,)), out / "longrope.json"


def test_keep_long_searches_the_short_set_alone(
    tuned: Path, text: Path, tmp_path: Path, long_set: tuple[RopeScaling, Path]
) -> None:
    first, init = long_set
    margin = {"short_margin": 0.0, "short": "search", "sets": ("128",)}
    again = _search(tuned, text, tmp_path / "again", init=init, keep_long=True, budget="20", **margin)
    assert (again.long_factor, again.long_attention_factor) == (first.long_factor, first.long_attention_factor)
    assert list(again.sets) == [128]
    assert again.provenance["long"]["chosen"] == first.provenance["chosen"]
    trials = [json.loads(line)["of"] for line in (tmp_path / "again" / "journal.jsonl").read_text().splitlines()[1:]]
    long = {(part, gradient) for part, _, gradient, _ in trials if part in (SEARCH, "validation")}
    assert long == {("validation", False)}
    assert any(part.startswith("short") and gradient for part, _, gradient, _ in trials)


@pytest.mark.parametrize("strategy", ["gradient", "evolution"])
def test_short_sets_keep_to_bounds_around_the_short_factors(
    tuned: Path, text: Path, tmp_path: Path, long_set: tuple[RopeScaling, Path], strategy: str
) -> None:
    """Relative to the long factors they would all be out of the paper's bounds, and pushed up to them."""
    options = {"init": long_set[1], "keep_long": True, "short": "search", "sets": ("48",)}
    if strategy == "gradient":
        options["gradient"] = GradientOptions(constraint="paper")
    _search(tuned, text, tmp_path / "out", strategy=strategy, short_bound=1.5, budget="80", **options)
    trials = [json.loads(line)["of"] for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()[1:]]
    for part, bound in (("short-search", 1.5), ("search@48", 1.25 * 48 / WINDOW)):
        proposed = [trial[3][0] for trial in trials if trial[0] == part]
        totals = np.array(proposed) * np.array(LONG) / np.array(SHORT)
        assert len(totals) > 8
        assert totals.min() > 1 - 1e-6
        assert totals.max() < bound + 1e-6
        assert np.ptp(totals, axis=0).max() > 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "name it with --init"),
        ({"init": "longrope.json", "short": "original"}, "nothing to search"),
    ],
)
def test_keep_long_needs_a_record_and_something_to_search(options: dict[str, str], words: str) -> None:
    with pytest.raises(LongRopeError, match=words):
        SearchConfig(keep_long=True, **options)  # type: ignore[arg-type]


def test_keep_long_needs_the_record_s_lengths(tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    record = tmp_path / "longrope.json"
    record.write_text(_record().to_json())
    with pytest.raises(ScalingError, match="needs the same lengths"):
        _search(tiny_folder, text, tmp_path / "out", init=record, keep_long=True)
