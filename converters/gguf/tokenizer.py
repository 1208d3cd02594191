"""tokenizer.json as llama.cpp's tokenizer keys: byte-level BPE (`gpt2`) and SentencePiece-like BPE
(`llama`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError, UnsupportedModelError
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.pre_tokenizers import pre_tokenizer_name

# llama.h, llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unk": "unk_token", "pad": "pad_token"}


@dataclass(frozen=True)
class GgufTokenizer:
    """Values of the `tokenizer.*` keys; `special` maps bos, eos, unk and pad to ids.

    `losses` says where llama.cpp splits some texts otherwise.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    special: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_space_prefix: bool = False
    chat_template: str | None = None
    losses: list[str] = field(default_factory=list)


def read_tokenizer(folder: Path, vocab_size: int, config: Mapping[str, Any]) -> GgufTokenizer:
    """The folder's tokenizer for a model with `vocab_size` embedding rows.

    Raises `InputFileError` for a missing or malformed file, `UnsupportedModelError` for a tokenizer that
    llama.cpp would apply differently.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputFileError(f"{folder} has no tokenizer.json; save the tokenizer with save_pretrained first")
    values = read_json(path)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    model = values.get("model")
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), Mapping):
        raise UnsupportedModelError(f"{path} is not a BPE tokenizer; only those are converted")
    if model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UnsupportedModelError(f"{path} uses dropout, subword prefixes or suffixes; llama.cpp has none")
    ids = _all_ids(path, values, model["vocab"], vocab_size)
    tokens, types = _token_table(ids, _added(values), vocab_size)
    add_bos, add_eos = _adds(values.get("post_processor"), settings)
    common: dict[str, Any] = {
        "tokens": tokens,
        "special": _special_ids(ids, settings, config),
        "add_bos": add_bos,
        "add_eos": add_eos,
        "chat_template": _chat_template(folder, settings),
    }
    if model.get("byte_fallback"):
        return _sentencepiece(path, values, model, types, common)
    return _byte_level(path, values, model, types, common)


def _byte_level(
    path: Path, values: Mapping[str, Any], model: Mapping[str, Any], types: list[int], common: dict[str, Any]
) -> GgufTokenizer:
    if values.get("normalizer") not in (None, {"type": "NFC"}):
        raise UnsupportedModelError(f"{path} has a normalizer; llama.cpp's byte-level BPE has none")
    pre = pre_tokenizer_name(values.get("pre_tokenizer"), ignore_merges=bool(model.get("ignore_merges")))
    return GgufTokenizer(model="gpt2", pre=pre, types=types, merges=_merges(path, model), **common)


def _sentencepiece(
    path: Path, values: Mapping[str, Any], model: Mapping[str, Any], types: list[int], common: dict[str, Any]
) -> GgufTokenizer:
    pairs = [merge.split(" ", 1) for merge in _merges(path, model)]
    scores = _scores(path, common["tokens"], types, pairs)
    typed = [BYTE if _BYTE_TOKEN.fullmatch(token) else kind for token, kind in zip(common["tokens"], types)]
    unknown = model.get("unk_token")
    if unknown in common["tokens"]:
        typed[common["tokens"].index(unknown)] = UNKNOWN
    prefix = _space_prefix(path, values)
    # Metaspace adds its space only where there is none; llama.cpp and SentencePiece always add it.
    once = prefix and values.get("pre_tokenizer") is not None
    return GgufTokenizer(
        model="llama",
        pre="default",
        types=typed,
        scores=scores,
        add_space_prefix=prefix,
        losses=["llama.cpp will add one more space to a text that begins with a space"] if once else [],
        **common,
    )


def _scores(path: Path, tokens: list[str], types: list[int], pairs: list[list[str]]) -> list[float]:
    """Scores with which SentencePiece's rule (join the best-scored piece first) equals the merge list.

    It does where all merges that make one piece stand together, and every possible pair is a merge: so it is
    in lists that were made from a SentencePiece model, and else the tokenizer is refused.
    """
    rank: dict[str, int] = {}
    previous = None
    made: dict[str, int] = {}
    for left, right in pairs:
        piece = left + right
        if piece != previous and piece in rank:
            raise UnsupportedModelError(f"{path} is not made from a SentencePiece model: merges of {piece!r} are apart")
        rank.setdefault(piece, len(rank))
        made[piece] = made.get(piece, 0) + 1
        previous = piece
    plain = zip(tokens, types, strict=True)
    known = {token for token, kind in plain if kind == NORMAL and not _BYTE_TOKEN.fullmatch(token)}
    for piece in sorted(known):
        ways = sum(piece[:cut] in known and piece[cut:] in known for cut in range(1, len(piece)))
        if made.get(piece, 0) != ways:
            raise UnsupportedModelError(
                f"{path} is not made from a SentencePiece model: a way to make {piece!r} is missing"
            )
    return [-float(rank[token]) if token in rank else -1e6 for token in tokens]


def _space_prefix(path: Path, values: Mapping[str, Any]) -> bool:
    """Whether text gets a leading space: by the normalizer (Llama 2) or a Metaspace pre-tokenizer (Mistral)."""
    normalizer, splitter = values.get("normalizer"), values.get("pre_tokenizer")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    steps = normalizer.get("normalizers") if isinstance(normalizer, Mapping) else normalizer
    if splitter is None and steps == [prepend, replace]:
        return True
    if splitter is None and (normalizer == replace or steps == [replace]):
        return False
    if normalizer is None and isinstance(splitter, Mapping):
        metaspace = {"type": "Metaspace", "replacement": SPACE, "split": False}
        if {key: splitter.get(key) for key in metaspace} == metaspace:
            return splitter.get("prepend_scheme") in ("first", "always")
    raise UnsupportedModelError(f"{path} handles spaces in a way that llama.cpp's SentencePiece tokenizer does not")


def _added(values: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    entries = values.get("added_tokens") or []
    valid = isinstance(entries, list) and all(isinstance(entry, Mapping) and "id" in entry for entry in entries)
    if not valid:
        raise InputFileError("tokenizer.json: added_tokens must be a list of tokens with ids")
    return {str(entry.get("content")): entry for entry in entries}


def _all_ids(path: Path, values: Mapping[str, Any], vocab: Mapping[str, Any], vocab_size: int) -> dict[str, int]:
    ids = {**vocab, **{content: entry["id"] for content, entry in _added(values).items()}}
    taken: dict[int, str] = {}
    for token, index in ids.items():
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < vocab_size:
            raise InputFileError(
                f"{path}: the token {token[:60]!r} has id {index}; the model has {vocab_size} embeddings"
            )
        if taken.setdefault(index, token) != token:
            raise InputFileError(f"{path}: the id {index} belongs to {taken[index][:60]!r} and to {token[:60]!r}")
    return ids


def _token_table(
    ids: Mapping[str, int], added: Mapping[str, Mapping[str, Any]], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Tokens and types by id; rows of the embedding without a token become unused ones."""
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    for token, index in ids.items():
        tokens[index] = token
        entry = added.get(token)
        types[index] = NORMAL if entry is None else CONTROL if entry.get("special") else USER_DEFINED
    return tokens, types


def _merges(path: Path, model: Mapping[str, Any]) -> list[str]:
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise InputFileError(f"{path} has no list of merges")
    joined = [" ".join(merge) if isinstance(merge, list) else str(merge) for merge in merges]
    if any(merge.count(" ") != 1 for merge in joined):
        raise InputFileError(f"{path} has a merge that is not a pair of pieces without spaces")
    return joined


def _special_ids(ids: Mapping[str, int], settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, key in _SPECIAL.items():
        token = settings.get(key)
        token = token.get("content") if isinstance(token, Mapping) else token
        fallback = config.get(f"{key}_id")
        fallback = fallback[0] if isinstance(fallback, list) and fallback else fallback
        index = ids.get(token) if isinstance(token, str) else fallback
        if isinstance(index, int) and not isinstance(index, bool) and 0 <= index <= max(ids.values(), default=-1):
            found[name] = index
    return found


def _adds(post_processor: Any, settings: Mapping[str, Any]) -> tuple[bool, bool]:
    """Whether the tokenizer puts BOS before and EOS after a text."""
    template = _template(post_processor)
    kinds = [next(iter(item)) for item in template if isinstance(item, Mapping) and item]
    before, after = kinds[:1] == ["SpecialToken"], kinds[-1:] == ["SpecialToken"]
    bos, eos = settings.get("add_bos_token"), settings.get("add_eos_token")
    return bos if isinstance(bos, bool) else before, eos if isinstance(eos, bool) else after


def _template(post_processor: Any) -> list[Any]:
    if not isinstance(post_processor, Mapping):
        return []
    if post_processor.get("type") == "Sequence":
        inner = post_processor.get("processors")
        return next((steps for item in inner if (steps := _template(item))), []) if isinstance(inner, list) else []
    single = post_processor.get("single")
    return single if isinstance(single, list) else []


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputFileError(f"{file} is not UTF-8 text; download it again") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
