"""The objective's parts: what is scored, with what weight, and that a needle is what it says."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from longrope_export.errors import LongRopeError, TextTooShortError
from longrope_export.search.config import SearchConfig
from longrope_export.search.documents import documents_hash, with_plain_losses
from longrope_export.search.mixture import Mixture, needle_piece, plain
from longrope_export.search.objective import ModelObjective
from longrope_export.search.protocol import SEARCH, VALIDATION, Trial
from longrope_export.search.space import Candidate

LONG = Candidate(tuple(float(value) for value in np.linspace(1.0, 5.0, 16)))


@pytest.mark.parametrize(
    ("text", "weights"),
    [
        ("perplexity", {"perplexity": 1.0}),
        ("perplexity=3, needle=1", {"perplexity": 0.75, "needle": 0.25}),
        ("last=2,short=0.5", {"last": 1.0, "short": 0.5}),
    ],
)
def test_mixtures(text: str, weights: dict[str, float]) -> None:
    assert Mixture.parse(text).weights == weights
    assert Mixture.parse(text).is_perplexity == (text == "perplexity")


@pytest.mark.parametrize(
    "text", ["", "ppl", "short", "perplexity=0", "perplexity=-1", "needle=x", "last,last", "last=nan"]
)
def test_other_objectives_are_refused(text: str) -> None:
    with pytest.raises(LongRopeError, match="objective"):
        Mixture.parse(text)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0])
def test_the_last_share_is_checked(share: float) -> None:
    with pytest.raises(LongRopeError, match="last share"):
        Mixture.parse("last", share)


@pytest.mark.parametrize(
    ("text", "passes"),
    [("perplexity", 1.0), ("perplexity,last", 1.0), ("needle", 1.0), ("last,needle", 1.0), ("perplexity,short", 1.25)],
)
def test_the_cost_of_a_document(text: str, passes: float) -> None:
    assert Mixture.parse(text).passes(4.0) == passes


def _documents(tiny: Any, text: str, tokenizer: Any = None, last_share: float = 0.25) -> Any:
    pieces = [row[:32] for row in tiny.rows[:2]]
    return Mixture.parse(text, last_share).documents(tiny.rows[:2], pieces, tokenizer, (0,))


def _loss(tiny: Any, documents: Any, candidate: Candidate = LONG, index: int = 0) -> float:
    objective = ModelObjective(tiny.model, tiny.numbers, {SEARCH: documents})
    loss = objective.measure(Trial(candidate, SEARCH, index)).loss
    objective.close()
    return loss


def test_the_last_part_is_the_mean_of_the_last_tokens(tiny: Any) -> None:
    whole, first = _loss(tiny, [tiny.rows[0]]), _loss(tiny, [tiny.rows[0][:96]])
    expected = (whole * 127 - first * 95) / 32
    assert _loss(tiny, _documents(tiny, "last")) == pytest.approx(expected, rel=1e-5)
    mixed = _loss(tiny, _documents(tiny, "perplexity=3,last=1"))
    assert mixed == pytest.approx(0.75 * whole + 0.25 * expected, rel=1e-5)
    assert _loss(tiny, _documents(tiny, "last", last_share=0.5)) != pytest.approx(expected, rel=1e-3)


def test_the_short_penalty_counts_only_what_is_above_the_unchanged_model(tiny: Any) -> None:
    short = [row[:32] for row in tiny.rows[:2]]
    unchanged = tiny.numbers.unchanged()
    gaps = []
    for candidate in (LONG, Candidate((1.05,) * 16), Candidate((1.3,) * 16), Candidate((2.0,) * 16), unchanged):
        for index in range(2):
            gap = _loss(tiny, short, candidate, index) - _loss(tiny, short, unchanged, index)
            plain_loss = _loss(tiny, tiny.rows[:2], candidate, index)
            mixed = _loss(tiny, _documents(tiny, "perplexity,short=2"), candidate, index)
            assert mixed == pytest.approx(plain_loss + 2.0 * max(0.0, gap), rel=1e-6)
            gaps.append(gap)
    assert min(gaps) < 0.0 < max(gaps)


@pytest.mark.parametrize("text", ["last", "perplexity,last=2,short=3", "perplexity,needle"])
def test_the_gradient_of_a_mixture_is_its_finite_difference(tiny: Any, tiny_tokenizer: Any, text: str) -> None:
    documents = _long_documents(tiny, text, tiny_tokenizer)
    model = copy.deepcopy(tiny.model).double()
    objective = ModelObjective(model, tiny.numbers, {SEARCH: documents})
    at = np.log([*LONG.factors, 1.1])
    outcome = objective.measure(Trial(_at(at), SEARCH, 0, gradient=True))
    assert outcome.gradient is not None
    assert outcome.loss == pytest.approx(objective.measure(Trial(_at(at), SEARCH, 0)).loss, rel=1e-5)
    # A slow pair: in the fast ones the loss of a random model bends within any step that float32 logits can show.
    index = 8 + int(np.argmax(np.abs(outcome.gradient[8:16])))
    step = np.zeros(17)
    step[index] = 2e-3
    first, second = (objective.measure(Trial(_at(at + sign * step), SEARCH, 0)).loss for sign in (1, -1))
    objective.close()
    assert outcome.gradient[index] == pytest.approx((first - second) / 4e-3, rel=0.05)


def _at(position: Any) -> Candidate:
    values = np.exp(position).tolist()
    return Candidate(tuple(values[:-1]), values[-1])


def _long_rows() -> list[Any]:
    generator = np.random.default_rng(3)
    return [np.concatenate([[1], generator.integers(3, 97, 599)]) for _ in range(4)]


def _long_documents(tiny: Any, text: str, tokenizer: Any) -> Any:
    rows = _long_rows()
    return Mixture.parse(text).documents(rows, [row[:32] for row in rows], tokenizer, (0,))


def test_a_needle_is_answered_at_the_end_and_only_the_answer_counts(tiny_tokenizer: Any) -> None:
    row = _long_rows()[0]
    piece = needle_piece(row, tiny_tokenizer, 48213, 0.5)
    assert len(piece.token_ids) == len(row)
    text = tiny_tokenizer.decode(piece.token_ids[1:].tolist())
    assert text.endswith("The pass key is 48213")
    scored = piece.token_ids[1:][piece.weights > 0]
    assert tiny_tokenizer.decode(scored.tolist()).strip() == "48213"
    assert piece.weights.sum() == pytest.approx(1.0)
    assert not piece.weights[: -len(scored)].any()
    assert text.count("48213") == 3
    assert piece.token_ids[0] == 1


def test_text_and_answer_are_scored_in_one_pass(tiny: Any, tiny_tokenizer: Any) -> None:
    documents = _long_documents(tiny, "perplexity=3,needle=1", tiny_tokenizer)
    assert [len(document) for document in documents] == [1] * 4
    ((piece,), row) = documents[0], _long_rows()[0]
    targets = piece.token_ids[1:]
    answer = np.flatnonzero(piece.weights == piece.weights[-1])
    assert tiny_tokenizer.decode(targets[answer].tolist()).strip().isdigit()
    assert piece.weights[answer].sum() == pytest.approx(0.25)
    text = np.flatnonzero(piece.weights)[: -len(answer)]
    assert piece.weights[text].sum() == pytest.approx(0.75)
    assert targets[text].tolist() == row[1 : 1 + len(text)].tolist()
    assert len(text) > 300


def test_the_last_part_around_a_needle_is_the_last_text(tiny: Any, tiny_tokenizer: Any) -> None:
    (piece,) = _long_documents(tiny, "last=3,needle=1", tiny_tokenizer)[0]
    scored = np.flatnonzero(piece.weights)
    assert scored.min() >= 599 - 150
    assert piece.weights.sum() == pytest.approx(1.0)


def test_depths_are_stratified_over_distinct_documents_with_distinct_keys(tiny: Any, tiny_tokenizer: Any) -> None:
    documents = _long_documents(tiny, "needle", tiny_tokenizer)
    texts = [tiny_tokenizer.decode(document[0].token_ids[1:].tolist()) for document in documents]
    depths = [text.index("Remember it") / len(text) for text in texts]
    assert (np.diff(depths) > 0.05).all()
    assert len({text[-5:] for text in texts}) == 4
    for text, row in zip(texts, _long_rows()):
        assert tiny_tokenizer.decode(row[1:20].tolist()) in text
    again = _long_documents(tiny, "needle", tiny_tokenizer)
    assert all((a[0].token_ids == b[0].token_ids).all() for a, b in zip(documents, again))
    other = Mixture.parse("needle").documents(_long_rows(), _long_rows(), tiny_tokenizer, (1,))
    assert any((a[0].token_ids != b[0].token_ids).any() for a, b in zip(documents, other))


def test_the_needle_s_loss_depends_on_the_needle(tiny: Any, tiny_tokenizer: Any) -> None:
    (piece,) = _long_documents(tiny, "needle", tiny_tokenizer)[0]
    hidden = piece.token_ids.copy()
    place = tiny_tokenizer.decode(hidden[1:].tolist()).index("Remember it")
    hidden[place - 20 : place + 30] = 5
    without = type(piece)(hidden, piece.weights)
    assert _loss(tiny, [(piece,)]) != _loss(tiny, [(without,)])


def test_a_window_without_room_for_a_needle_is_refused(tiny: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(TextTooShortError, match="leave needle out"):
        _documents(tiny, "needle", tiny_tokenizer)
    with pytest.raises(LongRopeError, match="tokenizer"):
        _documents(tiny, "needle")


def test_lm_head_sees_only_what_is_scored(tiny: Any) -> None:
    sizes: list[int] = []
    hook = tiny.model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-2]))
    objective = ModelObjective(tiny.model, tiny.numbers, {SEARCH: _documents(tiny, "last")})
    sizes.clear()
    for gradient in (False, True):
        objective.measure(Trial(LONG, SEARCH, 0, gradient))
    hook.remove()
    objective.close()
    assert sizes == [32, 32]


def test_tokens_and_weights_tell_documents_apart(tiny: Any) -> None:
    rows = {SEARCH: tiny.rows[:2], VALIDATION: tiny.rows[2:3]}
    base = with_plain_losses(rows)
    others = [
        with_plain_losses({**rows, VALIDATION: tiny.rows[3:4]}),
        {**base, SEARCH: _documents(tiny, "last")},
        {**base, SEARCH: (base[SEARCH][1], base[SEARCH][0])},
        {**base, "report": (plain(tiny.rows[5]),)},
    ]
    assert len({documents_hash(parts) for parts in (base, *others)}) == 5


def test_the_automatic_objective_has_needles_where_they_fit(tiny_tokenizer: Any) -> None:
    def chosen(tokenizer: Any = tiny_tokenizer, target: int = 2048, **options: Any) -> str:
        return SearchConfig(**options).with_texts(9, tokenizer, target).objective

    assert chosen() == "perplexity=0.97,needle=0.03"
    assert chosen(strategy="cmaes") == "perplexity=0.97,needle=0.03"
    assert chosen(strategy="evolution") == "perplexity"
    assert chosen(None) == "perplexity"
    assert chosen(target=128) == "perplexity"
    assert chosen(objective="last") == "last"
    assert chosen(strategy="evolution", objective="needle") == "needle"
