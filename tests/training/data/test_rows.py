"""Rows against restatements: which tokens come, how often, in which mixture, and that a row's number decides it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest

from longrope_export.errors import LongRopeError, TextTooShortError
from longrope_export.training.data.rows import Piece, Row, RowOptions, RowPlan
from longrope_export.training.data.shards import TokenStore

StoreOf = Callable[..., TokenStore]

LONG = [100, 64, 39, 40, 7]
SHORT = [30, 3, 11, 8, 25, 16, 5, 21, 13, 9, 27, 2]


def tokens_of(rows: Iterable[Row]) -> Counter[tuple[int, int]]:
    """How often each token (document, place) comes."""
    pieces = [piece for row in rows for piece in row.pieces]
    return Counter((piece.document, piece.start + place) for piece in pieces for place in range(piece.length))


def test_long_rows_are_disjoint_spans_of_every_document_that_has_them(store_of: StoreOf) -> None:
    plan = RowPlan(store_of(LONG), RowOptions(length=20))
    assert len(plan) == plan.long_rows == 5 + 3 + 1 + 2
    assert all(row.kind == "long" and len(row.pieces) == 1 and row.pieces[0].length == 20 for row in plan)
    assert Counter(row.pieces[0].document for row in plan) == {0: 5, 1: 3, 2: 1, 3: 2}
    tokens = tokens_of(plan)
    assert set(tokens.values()) == {1}
    assert all(place < LONG[document] for document, place in tokens)


def test_each_pass_takes_the_long_spans_from_new_places_in_a_new_order(store_of: StoreOf) -> None:
    plan = RowPlan(store_of(LONG), RowOptions(length=20), rows=11 * 40)
    passes = [[plan[index] for index in range(start, start + 11)] for start in range(0, 11 * 40, 11)]
    assert all(set(tokens_of(rows).values()) == {1} for rows in passes)
    assert {min(row.pieces[0].start for row in rows if row.pieces[0].document == 1) for rows in passes} == set(range(5))
    orders = {tuple(row.pieces[0].document for row in rows) for rows in passes}
    assert len(orders) > 30


def test_a_row_is_decided_by_its_number_alone(store_of: StoreOf) -> None:
    store = store_of(LONG + SHORT)
    options = RowOptions(length=20, window=30, long_share=0.5, seed=3)
    rows = list(RowPlan(store, options, rows=200))
    backwards = RowPlan(store, options, rows=200)
    assert [backwards[index] for index in reversed(range(200))] == rows[::-1]
    assert RowPlan(store, options, rows=200)[137] == rows[137]
    longer = RowPlan(store, options, rows=500)
    assert [longer[index] for index in range(200)] == rows


def test_the_seed_decides_the_rows(store_of: StoreOf) -> None:
    store = store_of(LONG + SHORT)

    def rows(seed: int, share: float) -> list[Row]:
        return list(RowPlan(store, RowOptions(length=20, window=30, long_share=share, seed=seed), rows=30))

    for share in (0.0, 1.0):
        assert rows(0, share) == rows(0, share) != rows(1, share)


@pytest.mark.parametrize("packing", ["best-fit", "first-fit"])
def test_short_rows_are_full_and_take_every_short_token_once(store_of: StoreOf, packing: str) -> None:
    plan = RowPlan(store_of([100, *SHORT]), RowOptions(length=32, window=30, long_share=0, packing=packing))
    assert len(plan) == plan.short_rows == sum(SHORT) // 32
    assert all(row.kind == "short" and sum(piece.length for piece in row.pieces) == 32 for row in plan)
    tokens = tokens_of(plan)
    assert set(tokens.values()) == {1}
    assert not any(document == 0 for document, _ in tokens), "it is longer than the window"
    assert sum(SHORT) - sum(tokens.values()) < 32


def test_best_fit_cuts_fewer_documents_than_first_fit(store_of: StoreOf) -> None:
    store = store_of(list(np.random.default_rng(5).integers(2, 60, 120)))

    def whole(packing: str) -> int:
        plan = RowPlan(store, RowOptions(length=64, long_share=0, packing=packing))
        return sum(piece.length == store.lengths[piece.document] for row in plan for piece in row.pieces)

    assert whole("best-fit") > whole("first-fit")


@pytest.mark.parametrize("packing", ["best-fit", "first-fit"])
def test_each_pass_packs_the_short_documents_anew(store_of: StoreOf, packing: str) -> None:
    store = store_of([4, 5, 6, 7] * 8)
    plan = RowPlan(store, RowOptions(length=32, long_share=0, packing=packing), rows=10)
    first, second = [plan[index] for index in range(5)], [plan[index] for index in range(5, 10)]
    assert set(tokens_of(second).values()) == {1}
    assert {frozenset(row.pieces) for row in first}.isdisjoint(frozenset(row.pieces) for row in second)


def test_the_window_decides_which_documents_are_short(store_of: StoreOf) -> None:
    store = store_of(SHORT)
    for window in (9, 21, 30):
        plan = RowPlan(store, RowOptions(length=8, window=window, long_share=0))
        assert {document for document, _ in tokens_of(plan)} <= {n for n, each in enumerate(SHORT) if each <= window}
        assert plan.short_rows == sum(each for each in SHORT if each <= window) // 8


def test_longer_documents_are_cut_when_asked(store_of: StoreOf) -> None:
    store = store_of([70, 10])
    plan = RowPlan(store, RowOptions(length=16, window=16, long_share=0, cut_longer=True), rows=5 * 50)
    assert plan.short_rows == 80 // 16
    starts = {piece.start for row in plan for piece in row.pieces if piece.document == 0}
    assert {0, 16, 32, 48, 64} <= starts
    with pytest.raises(TextTooShortError, match=r"at most 16 tokens have 10 tokens together.*takes 16"):
        RowPlan(store, RowOptions(length=16, window=16, long_share=0))


@pytest.mark.parametrize(
    ("share", "length", "row_length"), [(0.6, 20, 20), (0.25, 40, 16), (0.9, 16, 40), (0.5, 37, 11)]
)
def test_the_share_is_one_of_tokens(store_of: StoreOf, share: float, length: int, row_length: int) -> None:
    options = RowOptions(length=length, row_length=row_length, long_share=share, cut_longer=True)
    plan = RowPlan(store_of(LONG), options, rows=400)
    counted = {"long": 0, "short": 0}
    for index in range(400):
        row = plan[index]
        counted[row.kind] += sum(piece.length for piece in row.pieces)
        assert sum(piece.length for piece in row.pieces) == {"long": length, "short": row_length}[row.kind]
        assert abs(counted["long"] - share * sum(counted.values())) <= max(length, row_length), "at every moment"


def test_the_span_is_what_a_long_row_takes_and_the_length_what_counts(store_of: StoreOf) -> None:
    plan = RowPlan(store_of(LONG + SHORT), RowOptions(length=10, span=40, window=30, long_share=0.5), rows=60)
    long = [row for row in plan if row.kind == "long"]
    assert all(row.pieces[0].length == 40 for row in long)
    assert {row.pieces[0].document for row in long} == {0, 1, 3}
    assert len(long) == 30, "rows of 10 trained tokens each"


def test_one_pass_ends_before_a_text_comes_again(store_of: StoreOf) -> None:
    store = store_of(LONG + SHORT)
    for share in (0.0, 0.1, 0.5, 0.6, 0.95, 1.0):
        options = RowOptions(length=20, window=15, long_share=share)
        plan = RowPlan(store, options)
        passes = plan.passes()
        assert max(passes.values()) <= 1
        assert max(plan.passes(len(plan) + 1).values()) > 1
        kinds = Counter(row.kind for row in plan)
        assert passes == {kind: kinds[kind] / rows for kind, rows in plan_rows(plan).items() if rows}


def plan_rows(plan: RowPlan) -> dict[str, int]:
    return {"long": plan.long_rows, "short": plan.short_rows}


def test_only_the_given_documents_are_used(store_of: StoreOf) -> None:
    options = RowOptions(length=20, window=30, long_share=0.5)
    plan = RowPlan(store_of(LONG + SHORT), options, documents=[1, 2, 5, 7, 9], rows=100)
    assert {piece.document for row in plan for piece in row.pieces} == {1, 2, 5, 7, 9}


def test_documents_that_no_row_takes_are_told(store_of: StoreOf) -> None:
    store = store_of([100, 10, 31, 39, 30])

    def unused(**options: float) -> list[int]:
        return RowPlan(store, RowOptions(length=40, window=30, **options)).unused.tolist()  # type: ignore[arg-type]

    assert unused(long_share=0.5) == [2, 3]
    assert unused() == [1, 2, 3, 4]
    assert unused(long_share=0.5, cut_longer=True) == []
    assert RowPlan(store, RowOptions(length=40), documents=[0, 3]).unused.tolist() == [3]


def test_tokens_are_those_of_the_pieces(store_of: StoreOf) -> None:
    store = store_of(LONG + SHORT)
    plan = RowPlan(store, RowOptions(length=20, window=30, long_share=0.5), rows=20)
    for index, row in enumerate(plan):
        expected = [store.read(piece.document)[piece.start : piece.start + piece.length] for piece in row.pieces]
        assert [each.tolist() for each in plan.tokens(index)] == [each.tolist() for each in expected]


def test_every_row_has_random_numbers_of_its_own(store_of: StoreOf) -> None:
    store = store_of(LONG)
    plans = [RowPlan(store, RowOptions(length=20, seed=seed)) for seed in (0, 0, 1)]
    drawn = [[int(plan.rng(index).integers(1 << 60)) for index in range(9)] for plan in plans]
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 18


def test_a_row_beyond_the_last_is_none(store_of: StoreOf) -> None:
    plan = RowPlan(store_of(LONG), RowOptions(length=20), rows=7)
    assert len(list(plan)) == len(plan) == 7
    for index in (7, -1):
        with pytest.raises(IndexError, match=f"row {index} of 7"):
            plan[index]


def test_no_document_long_enough_is_named_with_its_tokens(store_of: StoreOf) -> None:
    store = store_of([30, 99, 45])
    with pytest.raises(
        TextTooShortError,
        match=r"longest document, \S*data\.jsonl:2, has 99 tokens and a row takes 100.*--positions pose",
    ):
        RowPlan(store, RowOptions(length=50, span=100))
    assert len(RowPlan(store, RowOptions(length=99))) == 1
    with pytest.raises(TextTooShortError, match=r"data\.jsonl:3, has 45 tokens"):
        RowPlan(store, RowOptions(length=50), documents=[0, 2])
    with pytest.raises(TextTooShortError, match="no document"):
        RowPlan(store, RowOptions(length=50), documents=[])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"length": 1}, "length is 1"),
        ({"row_length": 0}, "row_length is 0"),
        ({"window": 1}, "window is 1"),
        ({"span": 9}, "span is 9"),
        ({"long_share": 1.5}, "long_share is 1.5"),
        ({"long_share": float("nan")}, "long_share is nan"),
        ({"packing": "worst-fit"}, "packing 'worst-fit'.*best-fit, first-fit"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_options_that_make_no_rows_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(LongRopeError, match=message):
        RowOptions(**{"length": 10, **wrong})  # type: ignore[arg-type]


def test_pieces_of_a_cut_document_follow_one_another(store_of: StoreOf) -> None:
    plan = RowPlan(store_of([50, 33]), RowOptions(length=83, window=16, long_share=0, cut_longer=True))
    (row,) = plan
    for document, length in enumerate([50, 33]):
        pieces = sorted((piece for piece in row.pieces if piece.document == document), key=lambda piece: piece.start)
        assert pieces[0] == Piece(document, 0, 16)
        assert all(left.start + left.length == right.start for left, right in pairwise(pieces))
        assert sum(piece.length for piece in pieces) == length
