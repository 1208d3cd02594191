"""Packing against restatements that look at every piece, every time."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope_export.training.data.packing import Span, pack


def restated(spans: list[Span], row_length: int, packing: str) -> list[list[Span]]:
    waiting, rows = list(spans), []
    while sum(span[2] for span in waiting) >= row_length:
        row: list[Span] = []
        while left := row_length - sum(span[2] for span in row):
            candidates = [span for span in waiting if span[2] <= left] or waiting
            taken = candidates[0] if packing == "first-fit" else max(candidates, key=lambda span: span[2])
            waiting.remove(taken)
            document, start, length = taken
            row.append((document, start, min(length, left)))
            if length > left:
                waiting.append((document, start + left, length - left))
        rows.append(row)
    return rows


def of_lengths(lengths: list[int]) -> list[Span]:
    return [(document, 0, length) for document, length in enumerate(lengths)]


@pytest.mark.parametrize("packing", ["best-fit", "first-fit"])
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 25), max_size=30), st.integers(1, 16))
def test_rows_are_those_of_the_restatement(packing: str, lengths: list[int], row_length: int) -> None:
    packed = pack(of_lengths(lengths), row_length, packing)
    assert [packed.row(number) for number in range(len(packed))] == restated(of_lengths(lengths), row_length, packing)


@pytest.mark.parametrize("packing", ["best-fit", "first-fit"])
@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 16))
def test_rows_are_full_and_no_token_comes_twice(packing: str, lengths: list[int], row_length: int) -> None:
    packed = pack(of_lengths(lengths), row_length, packing)
    rows = [packed.row(number) for number in range(len(packed))]
    tokens = [(document, start + place) for row in rows for document, start, length in row for place in range(length)]
    assert all(sum(length for _, _, length in row) == row_length for row in rows)
    assert len(set(tokens)) == len(tokens)
    assert sum(lengths) - len(tokens) < row_length


def test_best_fit_takes_the_longest_that_fits() -> None:
    packed = pack(of_lengths([2, 5, 3, 8]), 10, "best-fit")
    assert packed.row(0) == [(3, 0, 8), (0, 0, 2)]


def test_first_fit_takes_the_first_that_fits() -> None:
    packed = pack(of_lengths([4, 9, 3, 3, 2]), 10, "first-fit")
    assert packed.row(0) == [(0, 0, 4), (2, 0, 3), (3, 0, 3)]


def test_when_nothing_fits_best_fit_cuts_the_longest_and_its_rest_comes_later() -> None:
    packed = pack(of_lengths([6, 7, 8]), 10, "best-fit")
    assert [packed.row(0), packed.row(1)] == [[(2, 0, 8), (1, 0, 2)], [(0, 0, 6), (1, 2, 4)]]


def test_when_nothing_fits_first_fit_cuts_the_first_and_its_rest_comes_last() -> None:
    packed = pack(of_lengths([6, 7, 8]), 10, "first-fit")
    assert [packed.row(0), packed.row(1)] == [[(0, 0, 6), (1, 0, 4)], [(2, 0, 8), (1, 4, 2)]]
