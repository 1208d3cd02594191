"""A needle in a row of real text: at its depth, as long as before, its answer at the end."""

from __future__ import annotations

import numpy as np
import pytest
from retrieval_runs import demo_documents, demo_tokenizer

from longrope_export.errors import TextTooShortError
from longrope_export.evaluation.documents import encode
from longrope_export.evaluation.needles import MAGIC, PASSKEY, TEMPLATES, needle_fits, needle_row

ROW = demo_documents(1024, 1)[0].token_ids


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_needle_stands_at_its_depth_in_the_text(name: str, depth: float) -> None:
    template, tokenizer = TEMPLATES[name], demo_tokenizer()
    needle = needle_row(ROW, tokenizer, template.largest, depth, template)
    assert len(needle.token_ids) == len(ROW)
    sentence = encode(tokenizer, "\n" + template.sentence.format(key=template.largest) + "\n")
    ids = needle.token_ids.tolist()
    place = next(i for i in range(len(ids)) if ids[i : i + len(sentence)] == sentence)
    before, after = needle.is_text[:place].sum(), needle.is_text[place:].sum()
    assert before / (before + after) == pytest.approx(depth, abs=0.002)


def test_text_goes_on_where_the_needle_interrupted_it_and_the_answer_ends_the_row() -> None:
    needle = needle_row(ROW, demo_tokenizer(), 1_234_567, 0.5, MAGIC)
    text = needle.token_ids[needle.is_text]
    assert np.array_equal(text, ROW[1 : 1 + len(text)])
    assert demo_tokenizer().decode(needle.token_ids[-needle.answer_tokens :].tolist()) == " 1234567"
    assert demo_tokenizer().decode(needle.token_ids[: -needle.answer_tokens].tolist()).endswith(MAGIC.lead)


def test_without_the_needle_all_else_stays() -> None:
    tokenizer = demo_tokenizer()
    with_it, without = (needle_row(ROW, tokenizer, 1_234_567, 0.5, MAGIC, hidden=hidden) for hidden in (True, False))
    assert len(without.token_ids) == len(with_it.token_ids)
    assert tokenizer.decode(without.token_ids.tolist()).count("1234567") == 1, "only the answer has it"
    assert tokenizer.decode(with_it.token_ids.tolist()).count("1234567") == 2
    assert without.is_text.sum() > with_it.is_text.sum()


def test_a_row_without_room_is_refused_with_what_it_needs() -> None:
    with pytest.raises(TextTooShortError, match=r"needs (\d+) tokens") as caught:
        needle_row(ROW[:30], demo_tokenizer(), 12_345, 0.5)
    needed = int(str(caught.value).split("needs ")[1].split()[0])
    assert len(needle_row(ROW[:needed], demo_tokenizer(), 12_345, 0.5).token_ids) == needed
    assert not needle_fits(demo_tokenizer(), needed)
    assert needle_fits(demo_tokenizer(), 3 * needed)


def test_templates_hold_the_key_in_the_sentence_alone() -> None:
    for template in (MAGIC, PASSKEY):
        assert "{key}" in template.sentence
        assert "{" not in template.introduction + template.question + template.lead
