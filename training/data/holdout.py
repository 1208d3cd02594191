"""Documents that are never trained on, so that a run can be measured on them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longrope_export.errors import TextTooShortError
from longrope_export.training.data.shards import TokenStore


@dataclass(frozen=True, eq=False)
class Split:
    """Numbers of documents int64: those to train on in their order, and those held out."""

    training: npt.NDArray[np.int64]
    held: npt.NDArray[np.int64]


def hold_out(store: TokenStore, count: int, *, length: int = 1, seed: int = 0) -> Split:
    """Hold out `count` different documents of at least `length` tokens, chosen by `seed` and by what they say.

    Neither order nor company of a document changes its turn, and copies of a held document are not trained on either.
    Raises `TextTooShortError` when there are not as many, or none would be left to train on.
    """
    hashes = store.hashes
    enough = np.unique(hashes[store.lengths >= length])
    if count > len(enough):
        raise TextTooShortError(
            f"{count} documents were asked to be held out and {len(enough)} have at least {length:,} tokens; "
            "hold out fewer, or give more texts"
        )
    turns = [
        hashlib.blake2b(int(each).to_bytes(8, "little"), key=seed.to_bytes(8, "little")).digest() for each in enough
    ]
    chosen = enough[sorted(range(len(enough)), key=turns.__getitem__)[:count]]
    held = np.isin(hashes, chosen)
    # Of copies, the first one is measured.
    first = np.sort(np.unique(hashes, return_index=True)[1])
    if count and held.all():
        raise TextTooShortError(
            "holding out these documents leaves none to train on; hold out fewer, or give more texts"
        )
    return Split(np.flatnonzero(~held), first[held[first]])
