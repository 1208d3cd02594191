"""The token ids that a check runs on: source text that every machine has."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from longrope_export.errors import TextTooShortError

# Long modules of the standard library: real text that belongs to no model's repository.
MODULES = ("argparse", "typing", "tarfile", "subprocess", "inspect", "ast", "zipfile", "doctest", "datetime", "locale")
# A token is seldom longer; the text grows by this many characters for every wanted token.
CHARACTERS_PER_TOKEN = 12


def prompt_ids(encode: Callable[[str], list[int]], length: int, *, seed: int, text: str | None = None) -> list[int]:
    """`length` token ids of `text`, or of standard library modules in an order that `seed` turns.

    Raises `TextTooShortError` when the given text is too short.
    """
    characters = length * CHARACTERS_PER_TOKEN
    ids = encode(standard_library_text(characters, seed)[:characters] if text is None else text)
    if len(ids) < length:
        raise TextTooShortError(f"the text has {len(ids):,} tokens, {length:,} are needed; give a longer text")
    return ids[:length]


def random_ids(vocabulary: int, length: int, *, seed: int) -> list[int]:
    """Uniformly drawn token ids, for a model without a tokenizer."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, length)]


def standard_library_text(characters: int, seed: int) -> str:
    """At least `characters` characters of source code, repeated from the start when the modules do not suffice."""
    start = seed % len(MODULES)
    text = "".join(_source(name) for name in MODULES[start:] + MODULES[:start])
    return text * -(-characters // len(text))


def _source(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")
