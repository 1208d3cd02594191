"""llama.cpp's names for the byte-level pre-tokenizers (`tokenizer.ggml.pre`), told by tokenizer.json's
structure.

llama.cpp holds one hard-coded regular expression per name (src/llama-vocab.cpp); a file with the wrong name
tokenizes differently without a word. Structures that are not in this table are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longrope_export.errors import UnsupportedModelError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """One llama.cpp name: the steps of tokenizer.json that it equals, and whether it takes whole words
    without merging.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    ignore_merges: bool = False


_ROWS = (
    PreTokenizer("gpt-2", (("bytes", "gpt2"),)),
    PreTokenizer("smollm", (("digits",), ("bytes", "gpt2"))),
    PreTokenizer("llama-bpe", (("split", _LLAMA3), ("bytes",)), ignore_merges=True),
    PreTokenizer("qwen2", (("split", _QWEN2), ("bytes",))),
    PreTokenizer("tekken", (("split", _TEKKEN), ("bytes",)), ignore_merges=True),
)
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {row.name: row for row in _ROWS}


def pre_tokenizer_name(pre_tokenizer: Any, *, ignore_merges: bool) -> str:
    """llama.cpp's name for tokenizer.json's `pre_tokenizer`; raises `UnsupportedModelError` when it has
    none.
    """
    steps = _steps(pre_tokenizer)
    for row in _ROWS:
        if steps == row.steps:
            if ignore_merges != row.ignore_merges:
                raise UnsupportedModelError(
                    f"the tokenizer splits like llama.cpp's {row.name!r} but has ignore_merges "
                    f"{ignore_merges}; llama.cpp would tokenize differently"
                )
            return row.name
    raise UnsupportedModelError(
        f"the pre-tokenizer {_described(pre_tokenizer)} has no known counterpart in llama.cpp; "
        f"known are: {', '.join(PRE_TOKENIZERS)}"
    )


def pre_tokenizer_json(name: str) -> dict[str, Any]:
    """tokenizer.json's `pre_tokenizer` for llama.cpp's `name`; raises `UnsupportedModelError` for an unknown
    name.
    """
    row = PRE_TOKENIZERS.get(name)
    if row is None:
        raise UnsupportedModelError(f"llama.cpp's pre-tokenizer {name[:60]!r} is not known here")
    steps = [_step_json(step) for step in row.steps]
    return steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}


def _steps(value: Any) -> tuple[tuple[str, ...], ...] | None:
    if not isinstance(value, Mapping):
        return None
    items = value.get("pretokenizers") if value.get("type") == "Sequence" else [value]
    if not isinstance(items, list):
        return None
    return tuple(_step(item) for item in items)


def _step(item: Any) -> tuple[str, ...]:
    if not isinstance(item, Mapping):
        return ("unknown",)
    kind = item.get("type")
    if kind == "Digits" and item.get("individual_digits") is True:
        return ("digits",)
    if kind == "ByteLevel" and not item.get("add_prefix_space"):
        return ("bytes", "gpt2") if item.get("use_regex", True) else ("bytes",)
    pattern = item.get("pattern")
    if (
        kind == "Split"
        and isinstance(pattern, Mapping)
        and item.get("behavior") == "Isolated"
        and not item.get("invert")
    ):
        return ("split", str(pattern.get("Regex")))
    return ("unknown",)


def _step_json(step: tuple[str, ...]) -> dict[str, Any]:
    if step[0] == "digits":
        return {"type": "Digits", "individual_digits": True}
    if step[0] == "split":
        return {"type": "Split", "pattern": {"Regex": step[1]}, "behavior": "Isolated", "invert": False}
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": len(step) == 2}


def _described(value: Any) -> str:
    if not isinstance(value, Mapping):
        return repr(value)[:80]
    items = value.get("pretokenizers")
    kinds = (
        [item.get("type") if isinstance(item, Mapping) else item for item in items] if isinstance(items, list) else []
    )
    return f"{value.get('type')}({', '.join(map(str, kinds))})"[:120] if kinds else str(value.get("type"))[:80]
