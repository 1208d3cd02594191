"""Held-out documents: which, how many, and that nothing of them is trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export.errors import TextTooShortError
from longrope_export.training.data.building import prepare
from longrope_export.training.data.holdout import hold_out
from longrope_export.training.data.shards import TokenStore

StoreOf = Callable[..., TokenStore]


def test_the_documents_are_divided(store_of: StoreOf) -> None:
    split = hold_out(store_of([20, 30, 40, 50, 60]), 2)
    assert len(split.held) == 2
    assert sorted([*split.training, *split.held]) == [0, 1, 2, 3, 4]
    assert split.training.tolist() == sorted(split.training)


def test_held_documents_have_the_length_that_is_measured(store_of: StoreOf) -> None:
    store = store_of([20, 30, 40, 50, 60])
    for seed in range(20):
        assert set(hold_out(store, 2, length=40, seed=seed).held) <= {2, 3, 4}
    assert any(set(hold_out(store, 2, seed=seed).held) & {0, 1} for seed in range(20))


def test_the_seed_decides_which(store_of: StoreOf) -> None:
    store = store_of(list(range(20, 60)))
    choices = [hold_out(store, 3, seed=seed).held.tolist() for seed in (0, 0, 1, 2)]
    assert choices[0] == choices[1]
    assert len({tuple(choice) for choice in choices}) == 3


def test_a_document_s_turn_depends_on_nothing_but_itself(tmp_path: Path, write_jsonl: Any, tiny_tokenizer: Any) -> None:
    texts = [f"document {number} of many" for number in range(30)]

    def held(order: list[str], name: str) -> set[bytes]:
        store = prepare([write_jsonl(order, name)], tiny_tokenizer, tmp_path / "cache")
        return {store.read(document).tobytes() for document in hold_out(store, 5).held}

    assert held(texts, "a.jsonl") == held(texts[::-1], "b.jsonl")
    assert len(held(texts, "a.jsonl") & held([*texts, "one more"], "c.jsonl")) >= 4


def test_copies_of_a_held_document_are_not_trained_on(tmp_path: Path, write_jsonl: Any, tiny_tokenizer: Any) -> None:
    texts = ["twice", "once", "twice", "another", "twice"]
    store = prepare([write_jsonl(texts)], tiny_tokenizer, tmp_path / "cache")
    for seed in range(10):
        split = hold_out(store, 2, seed=seed)
        held = {texts[document] for document in split.held}
        assert len(held) == len(split.held) == 2
        assert not held & {texts[document] for document in split.training}
        assert not {2, 4} & set(split.held), "the first of the copies is measured"


def test_too_few_documents_to_hold_out(store_of: StoreOf) -> None:
    store = store_of([20, 30, 40])
    with pytest.raises(TextTooShortError, match="3 documents were asked to be held out and 2 have at least 30 tokens"):
        hold_out(store, 3, length=30)
    with pytest.raises(TextTooShortError, match="leaves none to train on"):
        hold_out(store, 3)


def test_nothing_is_held_out_unless_asked(store_of: StoreOf) -> None:
    split = hold_out(store_of([20, 30]), 0)
    assert (split.training.tolist(), split.held.tolist()) == ([0, 1], [])
    assert split.held.dtype == np.int64
