"""RULER's variable tracking: a chain of assignments in noise, after one solved example."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial

from longrope_export.evaluation.tasks.ruler.draws import Draws
from longrope_export.evaluation.tasks.ruler.samples import Maker, Sample
from longrope_export.evaluation.tasks.ruler.templates import NOISE, VARIABLES

HOPS = 4
EXAMPLE_VALUE = "12345"
# Tokens of the solved example; where the length is short it takes an eighth of it.
EXAMPLE_TOKENS = 500


@dataclass(frozen=True)
class Example:
    """A solved question, with names of three letters that are new in every sample."""

    text: str
    names: tuple[str, ...]


def tracking_maker(example: Example) -> Maker:
    """Maker of questions that follow `example`."""
    return Maker(partial(tracking_sample, example=example), HOPS + 1, VARIABLES.budget)


def tracking_sample(draws: Draws, size: int, *, example: Example) -> Sample:
    """One sample with `size` sentences of noise."""
    names = _names(draws, 5)
    value = str(draws.word_value())
    question, lead = _question(draws, size, names, value)
    return Sample(f"{renewed(example, draws)}\n{question}", lead, tuple(names))


def make_example(draws: Draws, size: int) -> Example:
    """A solved question with `size` sentences of noise."""
    names = _names(draws, 3)
    question, lead = _question(draws, size, names, EXAMPLE_VALUE)
    return Example(f"{question} {lead}  {' '.join(names)}\n", tuple(names))


def renewed(example: Example, draws: Draws) -> str:
    """The example with other names and another value."""
    text = example.text
    for name in example.names:
        text = text.replace(name, draws.letters(len(name)))
    return text.replace(EXAMPLE_VALUE, str(draws.word_value()))


def _names(draws: Draws, letters: int) -> list[str]:
    names = [draws.letters(letters) for _ in range(HOPS + 1)]
    while len(set(names)) < HOPS + 1:
        names.append(draws.letters(letters))
    return list(dict.fromkeys(names))


def _question(draws: Draws, size: int, names: list[str], value: str) -> tuple[str, str]:
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for old, new in itertools.pairwise(names))]
    lines = [NOISE] * size
    for done, (place, step) in enumerate(zip(sorted(draws.random.sample(range(size), len(chain))), chain)):
        lines.insert(place + done, step)
    question = VARIABLES.prompt.format(context="\n".join(lines), query=value)
    return question, VARIABLES.lead.format(count=HOPS + 1, query=value)
