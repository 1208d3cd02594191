"""RULER's samples can be solved from their text: a program that reads the prompt gives exactly the references."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from longrope_export.evaluation.tasks.ruler.counting import common_words_sample, frequent_words_sample
from longrope_export.evaluation.tasks.ruler.draws import Draws
from longrope_export.evaluation.tasks.ruler.niah import SETTINGS, niah_sample, split_sentences
from longrope_export.evaluation.tasks.ruler.samples import Sample
from longrope_export.evaluation.tasks.ruler.templates import NOISE
from longrope_export.evaluation.tasks.ruler.tracking import EXAMPLE_VALUE, make_example, renewed, tracking_sample
from longrope_export.evaluation.tasks.ruler.words import AdjectiveNouns

ESSAY = tuple(("The wind blew. Nobody came! Was it late? " * 30).split())


def asked_values(sample: Sample) -> list[str]:
    """Values of the keys that the question names, read from the prompt."""
    context, question = sample.prompt.rsplit("\n", 1)
    named = re.search(r"for (.*) mentioned", question)
    assert named is not None
    keys = re.split(r", and |, ", named.group(1))
    needles = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", context)
    return [value for key in keys for found, value in needles if found == key]


@pytest.mark.parametrize("task", SETTINGS)
def test_needles_can_be_found_and_are_the_references(task: str) -> None:
    setting = SETTINGS[task]
    sample = niah_sample(Draws(3), 40, setting=setting, essay=ESSAY)
    assert sorted(asked_values(sample)) == sorted(sample.references)
    assert len(sample.references) == setting.queries * setting.values
    needles = sample.prompt.count("One of the special magic")
    assert needles == setting.needles + (40 if setting.haystack == "needle" else 0)
    one = len(sample.references) == 1
    assert sample.prompt.startswith("A special magic" if one else "Some special magic")
    assert sample.lead.endswith(" is" if one else " are")
    assert ("numbers" in sample.prompt.rsplit("\n", 1)[1]) == (setting.value == "numbers" and not one)


def test_a_sample_whose_needle_is_removed_cannot_be_solved() -> None:
    sample = niah_sample(Draws(3), 40, setting=SETTINGS["niah_single_1"])
    line = next(line for line in sample.prompt.split("\n") if line.startswith("One of"))
    assert asked_values(Sample(sample.prompt.replace(line, NOISE), sample.lead, sample.references)) == []


def test_kinds_of_keys_and_values_are_rulers() -> None:
    number = niah_sample(Draws(1), 9, setting=SETTINGS["niah_single_1"]).references[0]
    uuid = niah_sample(Draws(1), 9, setting=SETTINGS["niah_multikey_3"]).references[0]
    assert re.fullmatch(r"[1-9]\d{6}", number)
    assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){2}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", uuid)


def test_needles_move_with_the_seed() -> None:
    def place(seed: int) -> int:
        lines = niah_sample(Draws(seed), 40, setting=SETTINGS["niah_single_1"]).prompt.split("\n")
        return next(index for index, line in enumerate(lines) if line.startswith("One of"))

    assert len({place(seed) for seed in range(12)}) > 6


def test_a_text_that_is_too_short_is_repeated() -> None:
    sample = niah_sample(Draws(1), 3 * len(ESSAY), setting=SETTINGS["niah_single_2"], essay=ESSAY)
    assert sample.prompt.count("Nobody came!") in (89, 90)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        (
            'He came. "Why?" she said. (It was late.) So it is',
            ["He came.", '"Why?"', "she said.", "(It was late.)", "So it is"],
        ),
        ("Pi is 3.14 today! Yes", ["Pi is 3.14 today!", "Yes"]),
        ("no end", ["no end"]),
    ],
)
def test_sentences_end_where_their_marks_are(text: str, sentences: list[str]) -> None:
    assert list(split_sentences(text)) == sentences
    assert " ".join(split_sentences(text)) == text


def test_the_chain_of_variables_leads_from_the_value_to_the_references() -> None:
    sample = tracking_sample(Draws(5), 30, example=make_example(Draws(1), 6))
    question = sample.prompt[sample.prompt.rindex("Memorize and track") :]
    value = re.search(r"assigned the value (\d+)", question)
    assert value is not None
    steps = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", question)
    names = [value.group(1)]
    for name, source in steps:
        assert source == names[-1], "the chain stands in its order"
        names.append(name)
    assert tuple(names[1:]) == sample.references
    assert len(sample.references) == 5
    assert f"5 variables are assigned the value {value.group(1)}" in sample.lead


def test_the_solved_example_has_other_names_in_every_sample_and_stays_solved() -> None:
    example = make_example(Draws(1), 6)
    first, second = renewed(example, Draws(2)), renewed(example, Draws(3))
    assert first != second
    assert EXAMPLE_VALUE not in first
    for text in (first, second):
        answer = text.split("they are:")[1].split()
        assert [name for name, _ in re.findall(r"VAR (\w{3}) = (?:VAR )?(\w+)", text)] == answer
    assert tracking_sample(Draws(2), 9, example=example).prompt.count("Memorize and track") == 2


@pytest.mark.parametrize(("long", "often", "seldom"), [(True, 30, 3), (False, 6, 1)])
def test_the_references_are_the_ten_most_common_words(long: bool, often: int, seldom: int) -> None:
    sample = common_words_sample(Draws(2), 50, long=long)
    example, listed = sample.prompt.split("\nBelow is a numbered list")
    counts = Counter(re.findall(r"\d+\. (.+?)(?= \d+\. |\n)", listed))
    assert set(sample.references) == {word for word, _ in counts.most_common(10)}
    assert sorted(set(counts.values())) == [seldom, often]
    assert len(counts) == 50
    assert example.count("most common words in the above list? Answer:") == 1


def test_the_references_are_the_three_most_frequent_coded_words() -> None:
    sample = frequent_words_sample(Draws(2), 400, vocabulary=60)
    text = sample.prompt[: sample.prompt.rindex("\nQuestion")].rsplit("coded words. ", 1)[1]
    counts = Counter(text.split())
    assert counts.most_common(1)[0][0] == "..."
    assert [word for word, _ in counts.most_common(4)[1:]] == list(sample.references)
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")


def test_keys_are_in_the_order_of_the_whole_sorted_list() -> None:
    adjectives, nouns = ["wide", "blue", "blue-eyed ", "blue-e", "bluer", "a"], ["zoo", "eye", "e-mail", "ant"]
    whole = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    keys = AdjectiveNouns(adjectives, nouns)
    assert list(keys) == whole
    assert keys[1:3] == whole[1:3]
