"""The model's own chat template around a prompt, rendered by transformers' sandbox in a child process with limits.

The sandbox keeps a hostile template from running code; only a process of its own keeps it from running for ever or from
filling the memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.evaluation.prompts import PromptStyle

# Stands for the user's text: the template's own text is what is before and after it.
MARK = "LONGROPE-EXPORT-PROMPT"
LARGEST_TEMPLATE = 1 << 20  # characters
SECONDS = 10  # of processor time; imports do not count
_WALL_SECONDS = 600.0  # where processor time cannot be limited, or the process sleeps
_ADVICE = "ask in plain text instead (the option that ends in -prompt: base)"


def chat_style(tokenizer: Any) -> PromptStyle:
    """The tokenizer's chat template with one user's turn and the beginning of the model's.

    Raises `InputFileError` when there is none, or when it fails, runs on, or does not repeat the user's text once.
    """
    special = tuple(sorted((name, str(token)) for name, token in tokenizer.special_tokens_map.items()))
    text = _rendered(_template(tokenizer), special)
    if text.count(MARK) != 1:
        raise InputFileError(
            f"the model's chat template repeats a user's text {text.count(MARK)} times instead of once; {_ADVICE}"
        )
    before, _, after = text.partition(MARK)
    return PromptStyle(_control_ids(tokenizer, before), _control_ids(tokenizer, after))


def _template(tokenizer: Any) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    if not isinstance(template, str) or not template.strip():
        raise InputFileError(f"the model has no chat template; {_ADVICE}")
    if len(template) > LARGEST_TEMPLATE:
        raise InputFileError(f"the model's chat template has {len(template):,} characters; {_ADVICE}")
    return template


def _control_ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Ids of the template's own text: here `<s>` is a control token."""
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else ()


@lru_cache(maxsize=16)
def _rendered(template: str, special_tokens: tuple[tuple[str, str], ...]) -> str:
    return render_chat(template, [{"role": "user", "content": MARK}], dict(special_tokens))


def render_chat(
    template: str, messages: list[dict[str, str]], special_tokens: dict[str, str], *, seconds: int = SECONDS
) -> str:
    """Text of `messages` and the opening of the model's turn, as transformers' `apply_chat_template` renders them.

    Raises `InputFileError`, with the template's own message if it has one, when it fails or takes more than `seconds`
    of processor time.
    """
    request = {"template": template, "messages": messages, "special_tokens": special_tokens, "seconds": seconds}
    command = [sys.executable, "-P", "-m", "longrope_export.evaluation.chat_worker"]
    try:
        child = subprocess.run(
            command, input=json.dumps(request).encode(), capture_output=True, timeout=_WALL_SECONDS,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise InputFileError(f"the model's chat template does not come to an end; {_ADVICE}") from None
    try:
        answer = json.loads(child.stdout)
    except ValueError:
        # Killed by the limit on processor time, or by the one on memory inside an import.
        raise InputFileError(
            f"the model's chat template needs more than {seconds} s or more memory than any template should; {_ADVICE}"
        ) from None
    if "error" in answer:
        raise InputFileError(f"the model's chat template fails ({answer['error']}); {_ADVICE}")
    return str(answer["text"])
