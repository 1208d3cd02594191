"""The demo model's training rows: which kind of row comes when, and the row's tokens. A pure function of seed and step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from longrope_export.evaluation.stdlib_corpus import Document
from longrope_export.training.demo_retrieval import Material, row
from longrope_export.training.demo_tokenizer import BOS_ID

# (rows seen, share of each kind of row): linear in between, constant after the last. Repetition comes first because
# it starts induction; passkeys alone taught nothing in the first million tokens of an earlier trial.
CURRICULUM: tuple[tuple[int, dict[str, float]], ...] = (
    (0, {"text": 0.48, "repetition": 0.44, "look_up": 0.04, "needle": 0.00, "passkey": 0.04}),
    (8_000, {"text": 0.48, "repetition": 0.36, "look_up": 0.06, "needle": 0.03, "passkey": 0.07}),
    (16_000, {"text": 0.62, "repetition": 0.08, "look_up": 0.08, "needle": 0.08, "passkey": 0.14}),
    (24_000, {"text": 0.70, "repetition": 0.05, "look_up": 0.06, "needle": 0.07, "passkey": 0.12}),
)
# The library is read twice as often as its test suite, which is the longer of the two.
LIBRARY_REPEATS = 2


def training_material(
    library: Sequence[Document],
    tests: Sequence[Document],
    encode: Callable[[str], list[int]],
    vocabulary: int,
) -> Material:
    """Tokens and names of the training text; `encode` maps a text to ids without the opening token."""
    ids = [encode(document.text) for document in library]
    more = [encode(document.text) for document in tests]
    text = np.array([token for part in ids * LIBRARY_REPEATS + more for token in part], dtype=np.int64)
    found = Counter(name for d in library for name in re.findall(r"\b[a-z_][a-z_]{3,17}\b", d.text))
    names = tuple(sorted(name for name, count in found.items() if count >= 3))
    return Material(text, names, encode, vocabulary)


def shares(rows_seen: int) -> dict[str, float]:
    """Probability of each kind of row after `rows_seen` rows."""
    places = [place for place, _ in CURRICULUM]
    return {
        kind: float(np.interp(rows_seen, places, [share[kind] for _, share in CURRICULUM])) for kind in CURRICULUM[0][1]
    }


def batch(
    material: Material, *, seed: int, step: int, rows: int, window: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Tokens and loss weights, both [rows, window + 1], of one step; each row opens with `<|endoftext|>`."""
    rng = np.random.default_rng([seed, step])
    share = shares(step * rows)
    ids = np.full((rows, window + 1), BOS_ID, dtype=np.int64)
    weights = np.ones((rows, window + 1), dtype=np.float32)
    for place, kind in enumerate(rng.choice(list(share), size=rows, p=np.array(list(share.values())))):
        ids[place, 1:], weights[place, 1:] = row(str(kind), rng, material, window)
    return ids, weights
