"""Texts into token ids for training: where documents begin and end, and long texts in bounded memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from longrope_export.errors import InputFileError
from longrope_export.evaluation.documents import PLAIN_TEXT

Ids = npt.NDArray[np.int64]

# A tokenizer takes some 100 bytes for each character that it encodes at once.
LONG_TEXT = 1 << 19
SEAM = 1024

# auto: as the tokenizer itself does; always, never: whatever it does.
RULES = ("auto", "always", "never")


@dataclass(frozen=True)
class Ends:
    """Token ids that stand before and behind every document."""

    front: tuple[int, ...]
    back: tuple[int, ...]


def document_ends(tokenizer: Any, bos: str = "auto", eos: str = "auto") -> Ends:
    """BOS and EOS of a document by the rules `bos` and `eos`.

    `auto` puts BOS in front where the tokenizer itself begins a text with it (Llama, Mistral, Gemma; not Qwen, GPT-2),
    and EOS behind wherever one is defined: a document's end is what training teaches. Raises `InputFileError` when
    `always` asks for a token that the tokenizer does not define.
    """
    begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return Ends(_end("BOS", bos, tokenizer.bos_token_id, begins), _end("EOS", eos, tokenizer.eos_token_id, True))


def _end(name: str, rule: str, token: int | None, wanted: bool) -> tuple[int, ...]:
    if rule not in RULES:
        raise InputFileError(f"{name} {rule!r} is not known; take one of {', '.join(RULES)}")
    if rule == "never" or (rule == "auto" and (token is None or not wanted)):
        return ()
    if token is None:
        raise InputFileError(f"the tokenizer has no {name} token; take {name} by the rule auto or never")
    return (int(token),)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex SHA-256 of all that decides a text's token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts: Any = sorted(tokenizer.get_vocab().items())
    else:
        parts = json.loads(backend.to_str())
        # Left over from whatever was encoded last.
        parts |= {"truncation": None, "padding": None}
    content = [type(tokenizer).__name__, tokenizer.bos_token_id, tokenizer.eos_token_id, parts]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the highest token id."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    """Token ids of each text as plain text, int64; one longer than `LONG_TEXT` comes in parts that fit their seams."""
    fitting = [text for text in texts if len(text) <= LONG_TEXT]
    encoded = iter(tokenizer(fitting, **PLAIN_TEXT)["input_ids"] if fitting else ())
    return [_ids(next(encoded)) if len(text) <= LONG_TEXT else encode_long(tokenizer, text) for text in texts]


def encode_long(tokenizer: Any, text: str) -> Ids:
    """Token ids of a long text, int64, the same as of the whole text, at a fraction of the memory.

    Parts overlap. They are joined where both give the same tokens over `SEAM` characters, `SEAM` away from their ends;
    where they never do, or the tokenizer does not say where its tokens stand, the text is encoded whole.
    """
    seam = SEAM
    while tokenizer.is_fast and 3 * seam < LONG_TEXT:
        if (ids := _joined(tokenizer, text, seam)) is not None:
            return ids
        seam *= 8
    return _ids(tokenizer(text, **PLAIN_TEXT)["input_ids"])


def _joined(tokenizer: Any, text: str, seam: int) -> Ids | None:
    parts: list[Ids] = []
    begin, left, expected = 0, 0, None
    while True:
        end = min(begin + LONG_TEXT, len(text))
        ids, starts = _with_starts(tokenizer, text, begin, end)
        first = int(np.searchsorted(starts, left)) if parts else 0
        if expected is not None and not np.array_equal(_between(ids, starts, left, left + seam), expected):
            return None
        if end == len(text):
            return np.concatenate([*parts, ids[first:]])
        left = end - 2 * seam
        parts.append(ids[first : int(np.searchsorted(starts, left))])
        expected = _between(ids, starts, left, left + seam)
        begin = left - seam


def _with_starts(tokenizer: Any, text: str, begin: int, end: int) -> tuple[Ids, Ids]:
    """Token ids of `text[begin:end]`, and the character of `text` where each one starts."""
    encoded = tokenizer(text[begin:end], return_offsets_mapping=True, **PLAIN_TEXT)
    starts = np.fromiter((start for start, _ in encoded["offset_mapping"]), np.int64, len(encoded["input_ids"]))
    return _ids(encoded["input_ids"]), starts + begin


def _between(ids: Ids, starts: Ids, left: int, right: int) -> Ids:
    """The tokens that start in [left, right), with where they start: int64 [2, n]."""
    place = slice(*np.searchsorted(starts, [left, right]))
    return np.stack([ids[place], starts[place]])


def _ids(values: Sequence[int]) -> Ids:
    return np.array(values, dtype=np.int64)
