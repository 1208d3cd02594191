"""Passkey retrieval with the landmark-attention template, built to an exact number of tokens.

Prompt and answer together have exactly the asked length, so a model with that window never sees more. The key is
scored teacher-forced (one forward pass, argmax at every digit) and by greedy generation (first number in the output).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from longrope_export.errors import NumericalError, TextTooShortError
from longrope_export.evaluation.documents import encode
from longrope_export.evaluation.prompts import PromptStyle, ask, base_style

if TYPE_CHECKING:
    from torch import Tensor, nn

# Mohtashami & Jaggi, "Landmark Attention" (arXiv 2305.16300); the five parts are joined by line breaks.
INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
KEY_SENTENCE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION_LINE, LEAD = "What is the pass key?", "The pass key is"
QUESTION = f"{QUESTION_LINE} {LEAD}"
LARGEST_KEY = 50_000

Mode = Literal["forced", "generate", "both"]


@dataclass(frozen=True)
class PasskeyPrompt:
    """One prompt; `prompt_ids` and `answer_ids` together have `length` tokens, `depth` is the key's place."""

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    key: int
    depth: float

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


def build_prompt(
    tokenizer: Any, length: int, key: int, depth: float, style: PromptStyle | None = None
) -> PasskeyPrompt:
    """Prompt and answer of exactly `length` tokens (default style: plain text after BOS); filler fills what is left.

    A share `depth` (0…1) of the filler stands before the key. Raises `TextTooShortError` when the fixed parts alone
    need more than `length`.
    """
    style = style or base_style(tokenizer)
    introduction = [*style.opening, *encode(tokenizer, INTRODUCTION + "\n")]
    sentence = encode(tokenizer, "\n" + KEY_SENTENCE.format(key=key) + "\n")
    question, answer = ask(tokenizer, style, f"\n{QUESTION_LINE}", LEAD, str(key))
    room = length - len(introduction) - len(sentence) - len(question) - len(answer)
    if room < 0:
        raise TextTooShortError(
            f"a passkey prompt needs {length - room} tokens with this tokenizer; {length} is too short: "
            "ask for a longer length"
        )
    before = round(depth * room)
    prompt = introduction + _filler(tokenizer, before) + sentence + _filler(tokenizer, room - before) + question
    return PasskeyPrompt(tuple(prompt), tuple(answer), key, depth)


def _filler(tokenizer: Any, count: int) -> list[int]:
    """The first `count` tokens of the repeated filler sentences."""
    unit = encode(tokenizer, FILLER + " ")
    return encode(tokenizer, (FILLER + " ") * (count // max(1, len(unit) - 2) + 2))[:count]


def passkey_prompts(
    tokenizer: Any,
    length: int,
    trials: int,
    seed: int,
    *,
    depths: int | None = None,
    style: PromptStyle | None = None,
) -> list[PasskeyPrompt]:
    """`trials` prompts with keys drawn uniformly from 1…50,000; `seed` fixes the keys.

    Trial i stands at depth (i mod `depths` + ½)/`depths`; by default every trial has a depth of its own.
    """
    count = min(depths or trials, trials)
    keys = np.random.default_rng([seed, length]).integers(1, LARGEST_KEY, size=trials, endpoint=True)
    return [build_prompt(tokenizer, length, int(key), (i % count + 0.5) / count, style) for i, key in enumerate(keys)]


@dataclass(frozen=True)
class PasskeyTrial:
    """One scored prompt; `forced` and `generated` are None when that way was not asked for."""

    length: int
    key: int
    depth: float
    forced: bool | None
    generated: bool | None
    text: str | None


@dataclass(frozen=True)
class PasskeyResult:
    """All trials of one run; `accuracy` gives the share of right keys per length."""

    trials: tuple[PasskeyTrial, ...]
    seed: int
    seconds: float

    def accuracy(self, length: int, mode: Literal["forced", "generate"] = "forced") -> float | None:
        """Share of trials at `length` with the right key, or None when this mode was not run there."""
        scores = [
            trial.forced if mode == "forced" else trial.generated for trial in self.trials if trial.length == length
        ]
        known = [score for score in scores if score is not None]
        return sum(known) / len(known) if known else None

    @property
    def lengths(self) -> tuple[int, ...]:
        """The measured lengths in ascending order."""
        return tuple(sorted({trial.length for trial in self.trials}))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form: accuracies per length, then every trial."""
        return {
            "lengths": [
                {
                    "length": length,
                    "trials": sum(trial.length == length for trial in self.trials),
                    "forced": self.accuracy(length, "forced"),
                    "generated": self.accuracy(length, "generate"),
                }
                for length in self.lengths
            ],
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "trials": [dict(vars(trial)) for trial in self.trials],
        }


def evaluate_passkey(
    model: nn.Module,
    tokenizer: Any,
    lengths: Sequence[int],
    trials: int = 10,
    seed: int = 0,
    mode: Mode = "forced",
    *,
    progress: Callable[[int, int], None] | None = None,
) -> PasskeyResult:
    """Passkey accuracy of `model` at every length; `progress(done, all)` counts tokens of the prompts.

    Raises `TextTooShortError` when a length has no room for the template, before anything is run.
    """
    from longrope_export.evaluation.losses import check_head

    prompts = [prompt for length in sorted(set(lengths)) for prompt in passkey_prompts(tokenizer, length, trials, seed)]
    check_head(model)
    everything = sum(prompt.length for prompt in prompts)
    started, done, scored = time.perf_counter(), 0, []
    for prompt in prompts:
        scored.append(score(model, tokenizer, prompt, mode))
        done += prompt.length
        if progress:
            progress(done, everything)
    return PasskeyResult(tuple(scored), seed, time.perf_counter() - started)


def score(model: nn.Module, tokenizer: Any, prompt: PasskeyPrompt, mode: Mode) -> PasskeyTrial:
    """One prompt scored in the ways that `mode` names; a generated number must be the key, not begin like it."""
    text = generated_text(model, tokenizer, prompt) if mode != "forced" else None
    return PasskeyTrial(
        length=prompt.length,
        key=prompt.key,
        depth=prompt.depth,
        forced=forced_correct(model, tokenizer, prompt) if mode != "generate" else None,
        generated=None if text is None else first_number(text) == str(prompt.key),
        text=text,
    )


def forced_correct(model: nn.Module, tokenizer: Any, prompt: PasskeyPrompt) -> bool:
    """Whether the model's argmax is right at every answer token that holds a digit, in one forward pass.

    A token of white space alone before the digits is formatting, not retrieval, and is not scored.
    """
    import torch

    from longrope_export.evaluation.losses import body_states, head_logits
    from longrope_export.placement import input_device

    ids = torch.tensor([[*prompt.prompt_ids, *prompt.answer_ids]], device=input_device(model))
    start = len(prompt.prompt_ids) - 1
    with torch.no_grad():
        logits = head_logits(model, body_states(model, ids)[0, start:-1])
    if not torch.isfinite(logits).all():
        raise NumericalError(f"the model gives NaN or infinite logits at {prompt.length:,} tokens; try --dtype float32")
    return digits_right(tokenizer, prompt.answer_ids, logits.argmax(-1).tolist())


def digits_right(tokenizer: Any, answer_ids: Sequence[int], chosen: Sequence[int]) -> bool:
    """Whether `chosen` is the answer at every token that holds a digit; raises `ValueError` when it is not as long."""
    return all(
        token == wanted
        for token, wanted in zip(chosen, answer_ids, strict=True)
        if re.search(r"\d", tokenizer.decode([wanted]))
    )


def generated_text(model: Any, tokenizer: Any, prompt: PasskeyPrompt) -> str:
    """Greedy continuation of the prompt, one token longer than the answer; the model never sees more than `length`."""
    import torch
    from transformers import GenerationConfig

    from longrope_export.placement import input_device

    ids = torch.tensor([prompt.prompt_ids], device=input_device(model))
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=len(prompt.answer_ids) + 1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    with torch.no_grad():
        output: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))


def first_number(text: str) -> str | None:
    """First run of digits in `text`, or None."""
    found = re.search(r"\d+", text)
    return found.group() if found else None
