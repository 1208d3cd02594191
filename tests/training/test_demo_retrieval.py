"""Synthetic rows: the right length, an answer that stands in the row, weights where they belong, no held-out text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from longrope_export.demo import demo_model_path
from longrope_export.evaluation.documents import load_tokenizer
from longrope_export.evaluation.passkey import INTRODUCTION, KEY_SENTENCE, QUESTION, build_prompt
from longrope_export.evaluation.stdlib_corpus import HELD_OUT, Document
from longrope_export.training.demo_batches import CURRICULUM, batch, shares, training_material
from longrope_export.training.demo_retrieval import ANSWER, GENERATORS, Material, repetition, row

WINDOW = 256


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def material(tokenizer: Tokenizer) -> Material:
    source = Path(__file__).read_text(encoding="utf-8") * 4
    documents = [Document("this", source, "")]

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    return training_material(documents, documents, encode, tokenizer.get_vocab_size())


def text_without_filler(key: str) -> str:
    return f"{INTRODUCTION}\n\n{KEY_SENTENCE.format(key=key)}\n\n{QUESTION} {key}"


def place_of(part: list[int], ids: list[int]) -> int:
    return next(i for i in range(len(ids)) if ids[i : i + len(part)] == part)


def answers(ids: list[int], weights: list[float], tokenizer: Tokenizer, weight: float = ANSWER) -> list[str]:
    """The runs of tokens with this weight, decoded."""
    runs: list[list[int]] = [[]]
    for token, own in zip(ids, weights, strict=True):
        runs = [*runs, []] if own != weight else [*runs[:-1], [*runs[-1], token]]
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("kind", ["text", *GENERATORS])
def test_rows_fill_the_window(material: Material, kind: str) -> None:
    for seed in range(60):
        ids, weights = row(kind, np.random.default_rng(seed), material, WINDOW)
        assert len(ids) == len(weights) == WINDOW
        assert 0 <= min(ids) <= max(ids) < material.vocabulary


@pytest.mark.parametrize("kind", ["look_up", "needle", "passkey"])
def test_every_answer_was_stated_before(material: Material, tokenizer: Tokenizer, kind: str) -> None:
    complete = 0
    for seed in range(60):
        ids, weights = row(kind, np.random.default_rng(seed), material, WINDOW)
        for answer in answers(ids, weights, tokenizer):
            value = answer.strip(" .\n")
            assert tokenizer.decode(ids).count(value) >= 2, (kind, seed, answer)
            complete += 1
    assert complete >= 60


def test_passkey_rows_are_the_prompts_that_are_measured(material: Material, tokenizer: Tokenizer) -> None:
    """A row with the standard filler is, token by token, the evaluation's prompt of that length, key and depth."""
    hf_tokenizer = load_tokenizer(demo_model_path())
    found = 0
    for seed in range(40):
        ids, weights = row("passkey", np.random.default_rng(seed), material, WINDOW)
        key = answers(ids, weights, tokenizer)[-1].strip(" .")
        length = 1 + max(i for i, weight in enumerate(weights) if weight == ANSWER)  # BOS comes, "." goes
        room = length - len(material.encode(text_without_filler(key))) - 1
        head = len(material.encode(INTRODUCTION + "\n"))
        before = place_of(material.encode(f"\nThe pass key is {key}."), ids) - head
        prompt = build_prompt(hf_tokenizer, length, int(key), before / room)
        found += [*prompt.prompt_ids, *prompt.answer_ids] == [0, *ids[: length - 1]]
    assert found >= 10  # half of the rows have training text as filler


def test_keys_stand_at_every_depth(material: Material) -> None:
    needle = material.encode("The pass key is")
    places = []
    for seed in range(300):
        ids, _ = row("passkey", np.random.default_rng(seed), material, WINDOW)
        places.append(place_of(needle, ids))
    counts, _ = np.histogram(places, bins=5, range=(min(places), max(places)))
    assert counts.min() >= 15
    assert max(places) - min(places) > 100


def contains(whole: list[int], part: list[int]) -> bool:
    return f",{','.join(map(str, part))}," in f",{','.join(map(str, whole))},"


def test_repetition_counts_only_what_can_be_known(material: Material) -> None:
    """Random tokens count nothing at first and everything when they come again."""
    text, known, unknown = material.text.tolist(), 0, 0
    for seed in range(15):
        seen: list[int] = []
        for ids, weight in repetition(np.random.default_rng(seed), material, WINDOW):
            if len(ids) > 2 and not contains(text, ids):
                assert bool(weight) is contains(seen, ids)
                known, unknown = known + bool(weight), unknown + (not weight)
            seen += ids
    assert min(known, unknown) >= 10


def test_a_batch_is_a_function_of_seed_and_step(material: Material) -> None:
    first, weights = batch(material, seed=3, step=7, rows=8, window=WINDOW)
    again, _ = batch(material, seed=3, step=7, rows=8, window=WINDOW)
    assert first.shape == weights.shape == (8, WINDOW + 1)
    assert (first == again).all()
    assert (first[:, 0] == 0).all()
    assert (first != batch(material, seed=3, step=8, rows=8, window=WINDOW)[0]).any()
    assert (first != batch(material, seed=4, step=7, rows=8, window=WINDOW)[0]).any()


def test_the_curriculum_begins_with_repetition_and_ends_with_text() -> None:
    assert [sum(share.values()) for _, share in CURRICULUM] == pytest.approx([1.0] * len(CURRICULUM))
    assert set(shares(0)) == {"text", *GENERATORS}
    assert shares(0)["repetition"] > 0.4 > shares(0)["passkey"]
    assert shares(10**9)["text"] > 0.6 > shares(0)["text"]
    assert shares(10**9) == CURRICULUM[-1][1]
    middle = shares((CURRICULUM[0][0] + CURRICULUM[1][0]) // 2)
    assert CURRICULUM[1][1]["repetition"] < middle["repetition"] < CURRICULUM[0][1]["repetition"]


def test_the_library_counts_twice_and_its_tests_once(tokenizer: Tokenizer) -> None:
    encode = lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)  # noqa: E731
    material = training_material([Document("a", "alpha", "")], [Document("b", "omega", "")], encode, 3072)
    assert material.text.tolist() == encode("alpha") * 2 + encode("omega")
    assert "asyncio" in HELD_OUT["report"]
