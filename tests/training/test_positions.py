"""Examples: what every scheme promises, and each scheme against a restatement of its paper."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

import longrope_export.training.positions.example as example_module
import longrope_export.training.positions.pose as pose_module
from longrope_export.errors import LongRopeError
from longrope_export.training.positions import IGNORED, SCHEMES, Example, Positions, present
from longrope_export.training.positions.example import Presented
from longrope_export.training.positions.pose import chunk_lengths

TARGET, TOKENS, WINDOW = 400, 64, 20


def settings(scheme: str, **changes: Any) -> Positions:
    tokens = TARGET if scheme in ("full", "mixed") else TOKENS
    return Positions(**({"scheme": scheme, "target": TARGET, "tokens": tokens, "window": WINDOW} | changes))


def text(length: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """Tokens that tell where they stand: token i is 1000 + i."""
    return np.arange(1000, 1000 + length, dtype=np.uint16) + seed


def draws(scheme: Positions, lengths: tuple[int, ...], count: int) -> list[Example]:
    rng = np.random.default_rng(1)
    return [present([text(length, 5000 * i) for i, length in enumerate(lengths)], scheme, rng) for _ in range(count)]


CASES = [
    (settings("full"), (100, 7, 30)),
    (settings("pose"), (TOKENS,)),
    (settings("pose", chunks=5, text_offsets=True), (300,)),
    (settings("pose", chunks=3), (30, 2, 32)),
    (settings("segments"), (TARGET,)),
    (settings("segments", alpha=0.125), (150, 90)),
    (settings("random"), (40, 24)),
    (settings("mixed"), (20, 21, 350)),
]


@pytest.mark.parametrize(("scheme", "lengths"), CASES, ids=lambda case: getattr(case, "scheme", ""))
def test_an_example_holds_what_its_arrays_promise(scheme: Positions, lengths: tuple[int, ...]) -> None:
    for example in draws(scheme, lengths, 20):
        ids, positions = example.input_ids, example.position_ids
        assert [ids.dtype, example.labels.dtype, positions.dtype, example.documents.dtype] == [np.int64] * 4
        assert example.long.dtype == np.bool_
        assert len(example) == min(sum(lengths), scheme.tokens)
        for number in range(len(lengths)):
            own = example.documents == number
            assert (np.diff(positions[own]) > 0).all(), "positions rise within a document"
            assert positions[own].min() >= 0
            assert positions[own].max() < scheme.target
            assert (np.diff(ids[own]) > 0).all(), "text stays in order"
            assert len(set(example.long[own])) == 1, "one set of factors a document"
        assert (np.diff(example.documents) >= 0).all()
        # A label is the token that follows in the text, and only where it follows in the row too.
        follows = np.append((np.diff(ids) == 1) & (np.diff(example.documents) == 0), False)
        assert np.array_equal(example.labels, np.where(follows, ids + 1, IGNORED))


@pytest.mark.parametrize(("scheme", "lengths"), CASES, ids=lambda case: getattr(case, "scheme", ""))
def test_the_generator_that_is_passed_decides_everything(scheme: Positions, lengths: tuple[int, ...]) -> None:
    documents = [text(length) for length in lengths]
    np.random.seed(0)  # the global state must not matter
    first = present(documents, scheme, np.random.default_rng(7))
    np.random.seed(1)
    again = present(documents, scheme, np.random.default_rng(7))
    other = present(documents, scheme, np.random.default_rng(8))
    assert all(np.array_equal(getattr(first, name), getattr(again, name)) for name in vars(first))
    assert np.array_equal(first.position_ids, other.position_ids) == (scheme.scheme in ("full", "mixed"))


def test_every_scheme_is_tested_here() -> None:
    assert {scheme.scheme for scheme, _ in CASES} == set(SCHEMES)


def test_full_presents_every_token_at_its_own_position_with_long_factors() -> None:
    example = draws(settings("full"), (50, 3), 1)[0]
    assert example.position_ids.tolist() == [*range(50), *range(3)]
    assert example.documents.tolist() == [0] * 50 + [1] * 3
    assert example.long.all()


def released_pose(ids: list[int], window: int, target: int, draw: Any) -> tuple[list[int], list[int]]:
    """PoSE's released preprocessing, restated; `draw(low, high)` includes both ends."""
    size = min(len(ids), window)
    right1 = draw(1, (size + 1) // 2)
    right2 = draw(size, len(ids))
    left2 = right2 - (size - right1)
    skip = draw(0, target - size)
    positions = [*range(right1), *(position + skip for position in range(right1, size))]
    return ids[:right1] + ids[left2:right2], positions


@pytest.mark.parametrize("length", [300, TOKENS, 41, 1])
def test_two_chunks_are_drawn_as_in_the_released_code(length: int) -> None:
    rng, ours = np.random.default_rng(3), np.random.default_rng(3)

    def draw(low: int, high: int) -> int:
        value: int = rng.integers(low, high, endpoint=True)
        return value

    for _ in range(200):
        # One token is one chunk here; the released code would make the second one empty.
        expected = released_pose(text(length).tolist(), TOKENS, TARGET, draw) if length > 1 else ([1000], [0])
        example = present([text(length)], settings("pose", text_offsets=True), ours)
        assert (example.input_ids.tolist(), example.position_ids.tolist()) == expected
        assert example.long.all()


def test_pose_reaches_every_skip_and_both_ends_of_the_first_chunk() -> None:
    scheme = settings("pose", target=12, tokens=8, window=4)
    seen = Counter()
    for example in draws(scheme, (8,), 1000):
        jumps = np.diff(example.position_ids)
        first = int(np.argmax(jumps > 1)) + 1 if (jumps > 1).any() else None
        seen[first, int(example.position_ids[-1]) - 7] += 1
    assert {skip for _, skip in seen} == {0, 1, 2, 3, 4}
    assert {first for first, _ in seen} == {None, 1, 2, 3, 4}
    skips = Counter()
    for (_, skip), count in seen.items():
        skips[skip] += count
    assert all(abs(count - 200) < 55 for count in skips.values()), skips


def test_pose_without_text_offsets_keeps_the_text_in_one_piece() -> None:
    for example in draws(settings("pose", chunks=4), (300,), 20):
        assert example.input_ids.tolist() == [*range(1000, 1000 + TOKENS)]
        assert (example.labels[:-1] != IGNORED).all()
    texts = {tuple(example.input_ids) for example in draws(settings("pose", text_offsets=True), (300,), 20)}
    assert len(texts) > 15


@pytest.mark.parametrize("chunks", [1, 2, 3, 7, 64])
def test_n_chunks_follow_the_paper_s_equations(chunks: int) -> None:
    rng, ours = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(50):
        lengths = chunk_lengths(TOKENS, chunks, rng)
        text_offsets, skips = [0], [0]
        for values, highest in ((text_offsets, 300 - TOKENS), (skips, TARGET - TOKENS)):
            for _ in range(chunks - 1):
                values.append(rng.integers(values[-1], highest + 1))
        ids, positions, start = [], [], 0
        for size, v, u in zip(lengths, text_offsets, skips):
            ids += [1000 + v + start + k for k in range(size)]
            positions += [u + start + k for k in range(size)]
            start += size
        example = present([text(300)], settings("pose", chunks=chunks, text_offsets=True), ours)
        assert (example.input_ids.tolist(), example.position_ids.tolist()) == (ids, positions)


def test_chunk_lengths_fill_the_window_and_none_is_empty() -> None:
    rng = np.random.default_rng(0)
    for total in (1, 2, 3, 10, 64):
        for chunks in {1, 2, 3, total // 2, total - 1, total} & set(range(1, total + 1)):
            for _ in range(30):
                lengths = chunk_lengths(total, chunks, rng)
                assert (len(lengths), sum(lengths), min(lengths) >= 1) == (chunks, total, True)
    assert {chunk_lengths(9, 2, rng)[0] for _ in range(200)} == {1, 2, 3, 4, 5}, "1 … (9 + 1) // 2"


def test_segments_are_ordered_do_not_overlap_and_keep_their_true_positions() -> None:
    for example in draws(settings("segments"), (TARGET,), 50):
        assert np.array_equal(example.input_ids - 1000, example.position_ids)
        pieces = np.split(example.position_ids, [16, 32, 48])
        assert all((np.diff(piece) == 1).all() for piece in pieces), "four segments of a quarter of 64 tokens"
        assert example.long.all()


def test_a_segment_s_first_token_is_not_scored_unless_the_text_before_it_is_in_the_row() -> None:
    example = draws(settings("segments"), (TARGET,), 1)[0]
    unscored = {int(place) for place in np.flatnonzero(example.labels == IGNORED)}
    cuts = np.flatnonzero(np.diff(example.position_ids) > 1)
    assert unscored == {*cuts.tolist(), TOKENS - 1}
    touching = present([text(TOKENS)], settings("segments"), np.random.default_rng(0))
    assert (touching.labels != IGNORED).sum() == TOKENS - 1, "segments that touch are one text"


def test_every_placement_of_segments_is_equally_likely() -> None:
    scheme = settings("segments", target=9, tokens=4, alpha=0.5)
    seen = Counter(tuple(example.position_ids.tolist()) for example in draws(scheme, (9,), 1400))
    starts = [(a, b) for a, b in combinations(range(8), 2) if b - a >= 2]
    assert set(seen) == {(a, a + 1, b, b + 1) for a, b in starts}
    assert all(abs(count - 1400 / len(starts)) < 35 for count in seen.values()), seen


def test_a_number_of_tokens_that_segments_do_not_divide_is_filled() -> None:
    example = draws(settings("segments", tokens=11, target=400), (400,), 1)[0]
    assert len(example) == 11


def test_random_positions_are_a_sorted_sample_without_replacement() -> None:
    scheme = settings("random", target=6, tokens=3)
    seen = Counter(tuple(example.position_ids.tolist()) for example in draws(scheme, (3,), 1000))
    assert set(seen) == set(combinations(range(6), 3))
    assert all(abs(count - 50) < 30 for count in seen.values()), seen


def test_random_keeps_the_text_and_uses_the_long_factors() -> None:
    example = draws(settings("random"), (TOKENS,), 1)[0]
    assert example.input_ids.tolist() == [*range(1000, 1000 + TOKENS)]
    assert example.long.all()


def test_mixed_chooses_the_factors_of_each_document_by_its_own_length() -> None:
    example = draws(settings("mixed"), (WINDOW, WINDOW + 1, 1), 1)[0]
    assert example.long.tolist() == [False] * WINDOW + [True] * (WINDOW + 1) + [False]
    assert example.position_ids.tolist() == [*range(WINDOW), *range(WINDOW + 1), 0], "positions start anew"


@pytest.mark.parametrize("scheme", ["pose", "segments", "random"])
def test_a_row_of_several_documents_is_cut_to_its_tokens_in_proportion(scheme: str) -> None:
    example = draws(settings(scheme), (100, 200, 20), 1)[0]
    assert np.bincount(example.documents).tolist() == [20, 40, 4]
    starts = [int(example.position_ids[np.argmax(example.documents == number)]) for number in range(3)]
    if scheme == "pose":
        assert starts == [0, 0, 0], "every document starts at 0"


def test_a_document_without_a_share_leaves_no_trace() -> None:
    example = draws(settings("pose"), (1, 400, 400), 1)[0]
    assert np.bincount(example.documents).tolist() == [32, 32]


def test_text_that_a_row_needs() -> None:
    assert [settings(scheme).text_tokens for scheme in SCHEMES] == [TARGET, TOKENS, TARGET, TOKENS, TARGET]
    assert settings("pose", text_offsets=True).text_tokens == 5 * TOKENS, "as in the released code"
    assert settings("pose", text_offsets=True, text_factor=3).text_tokens == 3 * TOKENS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scheme": "dilated"}, "choose one of full, pose, segments, random, mixed"),
        ({"tokens": TARGET + 1}, "does not fit into positions 0…399"),
        ({"scheme": "full", "tokens": 64}, "choose pose or segments"),
        ({"scheme": "mixed", "tokens": 64}, "choose pose or segments"),
        ({"chunks": 0}, "0 chunks"),
        ({"chunks": 65}, "65 chunks"),
        ({"scheme": "segments", "alpha": 0.3}, "one over a whole number"),
        ({"scheme": "segments", "alpha": 0.0}, "alpha is 0.0"),
        ({"scheme": "segments", "alpha": 1e-3}, "1000 segments do not fit into 64 tokens"),
        ({"window": 0}, "window is 0"),
        ({"text_factor": 0}, "text_factor is 0"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(LongRopeError, match=words):
        replace(settings("pose"), **changes)


@pytest.mark.parametrize("documents", [[], [text(3), text(0)]])
def test_a_row_without_tokens_is_refused(documents: list[Any]) -> None:
    with pytest.raises(LongRopeError, match="at least one token"):
        present(documents, settings("full"), np.random.default_rng(0))


def test_an_example_of_unequal_arrays_is_refused() -> None:
    example = draws(settings("full"), (5,), 1)[0]
    with pytest.raises(ValueError, match="all must be"):
        replace(example, labels=example.labels[1:])


def not_skipped(highest: int, count: int, rng: np.random.Generator) -> Any:
    return np.zeros(count, dtype=np.int64)


def equal_chunks(total: int, chunks: int, rng: np.random.Generator) -> list[int]:
    return [total // chunks] * chunks


def across_cuts(ids: Any, indices: Any) -> Any:
    return np.append(ids[indices[1:]], IGNORED)


def long_at_the_window(length: int, budget: int, scheme: Positions, rng: np.random.Generator) -> Presented:
    return Presented(np.arange(budget), np.arange(budget), budget >= scheme.window)


MUTANTS: dict[str, tuple[Any, str, Any, Any]] = {
    "positions are not skipped": (
        pose_module, "_ascending", not_skipped, lambda: test_two_chunks_are_drawn_as_in_the_released_code(300)
    ),
    "the first chunk does not start at 0": (
        pose_module, "_ascending", lambda *all: not_skipped(*all) + 1,
        lambda: test_a_row_of_several_documents_is_cut_to_its_tokens_in_proportion("pose"),
    ),
    "chunks are equally long": (
        pose_module, "chunk_lengths", equal_chunks, test_pose_reaches_every_skip_and_both_ends_of_the_first_chunk
    ),
    "labels reach across a cut": (
        example_module, "_labels", across_cuts,
        test_a_segment_s_first_token_is_not_scored_unless_the_text_before_it_is_in_the_row,
    ),
    "a document of the window's length is long": (
        SCHEMES, "mixed", long_at_the_window, test_mixed_chooses_the_factors_of_each_document_by_its_own_length
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, name, replacement, check = MUTANTS[mutant]
    check()
    (monkeypatch.setitem if isinstance(module, dict) else monkeypatch.setattr)(module, name, replacement)
    with pytest.raises(AssertionError):
        check()
