"""What the demo model reaches, measured on its files as they are shipped, and the card that says so."""

from __future__ import annotations

import json
import platform
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.evaluation.documents import load_tokenizer, rows_from_texts
from longrope_export.evaluation.passkey import Mode, evaluate_passkey
from longrope_export.evaluation.perplexity import evaluate_perplexity
from longrope_export.evaluation.stdlib_corpus import HELD_OUT, Split, documents, file_hashes

REPORT_ROWS = 128
PASSKEY_SEED = 2024


@dataclass(frozen=True)
class Measured:
    """Perplexity of the report split and passkey accuracy, both at the window's length, in float32."""

    perplexity: float
    passkey_forced: float
    passkey_generated: float | None
    trials: int


@dataclass(frozen=True)
class Run:
    """How the weights came about; `command` is the argument list, `seconds` the wall time of all sittings."""

    command: list[str]
    steps: int
    tokens: int
    seconds: float
    parameters: int
    window: int
    threads: int


def measure(folder: Path, *, trials: int, generated: bool = True, library: Path | None = None) -> Measured:
    """Load the model in `folder` and measure it on the report split: `REPORT_ROWS` rows, `trials` passkey prompts."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    window = int(model.config.max_position_embeddings)
    texts = [(document.name, document.text) for document in documents("report", library=library)]
    rows = rows_from_texts(texts, tokenizer, window, REPORT_ROWS)
    perplexity = evaluate_perplexity(model, rows, [window]).at(window).perplexity
    mode: Mode = "both" if generated else "forced"
    keys = evaluate_passkey(model, tokenizer, [window], trials, PASSKEY_SEED, mode)
    forced = keys.accuracy(window, "forced")
    assert forced is not None
    return Measured(perplexity, forced, keys.accuracy(window, "generate"), trials)


def card_numbers(folder: Path) -> dict[str, Any]:
    """The numbers of the card in `folder`, from `heldout.json` beside it."""
    return dict(json.loads((folder / "heldout.json").read_text(encoding="utf-8")))


def perplexity_tolerance(numbers: dict[str, Any], library: Path | None = None) -> float:
    """How far the perplexity of the report split may be from the card's, as a share: 0.5 % on the very files that the
    card was measured on, 15 % on another Python's.
    """
    return 0.005 if numbers["sha256"]["report"] == file_hashes("report", library) else 0.15


def held_out_record(measured: Measured, run: Run, library: Path | None = None) -> dict[str, Any]:
    """Measured numbers, Python version and the SHA-256 of every held-out file, JSON-ready."""
    splits: tuple[Split, ...] = ("search", "validation", "report")
    return {
        "python": platform.python_version(),
        "implementation": platform.python_implementation(),
        "window": run.window,
        "report_rows": REPORT_ROWS,
        "report_perplexity": round(measured.perplexity, 4),
        "passkey_trials": measured.trials,
        "passkey_seed": PASSKEY_SEED,
        "passkey_forced": measured.passkey_forced,
        "passkey_generated": measured.passkey_generated,
        "sha256": {split: file_hashes(split, library) for split in splits},
    }


def card(measured: Measured, run: Run) -> str:
    """The model card, Markdown with the front matter that model hubs read."""
    generated = "–" if measured.passkey_generated is None else f"{measured.passkey_generated:.1%}"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    held_out = "\n".join(f"- {split}: {', '.join(names)}" for split, names in HELD_OUT.items())
    return f"""---
license: apache-2.0
language: [en, code]
library_name: transformers
pipeline_tag: text-generation
tags: [longrope-export, demo]
---
# The demo model of longrope-export

A Llama of {run.parameters:,} parameters with a window of {run.window} tokens, made to be extended: it is small enough that
a search over its RoPE factors takes minutes on a laptop, and it can retrieve, so that retrieval beyond the window means
something. It is no use for anything else.

| measured on these files, float32 | |
|---|---:|
| perplexity of the report split at {run.window} tokens ({REPORT_ROWS} rows) | {measured.perplexity:.3f} |
| passkey at {run.window} tokens, {measured.trials} prompts, depths stratified, teacher-forced | {measured.passkey_forced:.1%} |
| the same, greedy generation | {generated} |

With the same library files (`heldout.json` has the SHA-256 of each) the perplexity comes out within 0.5 %; with
another Python's library within 15 %. A test of the project holds the numbers.

## Training
- Text: the source files of the standard library of {python} (read twice) and its test suite (read once), without the
  held-out modules and their tests, without `encodings`. No other text.
- About a third of the rows is synthetic: repeated segments, look-ups of names, needles, and the standard passkey
  prompt itself, always inside the window of {run.window} tokens. Repetition comes first, because it starts induction.
- {run.steps:,} steps, {run.tokens:,} tokens, {run.seconds / 60:.0f} minutes on {run.threads} threads of a CPU; Muon and
  AdamW, bfloat16 autocast, float32 weights rounded to bfloat16 at the end.
- Command: `{shlex.join(run.command)}`

Every row opens with `<|endoftext|>` (token 0), which is BOS and EOS: the tokenizer adds it. The tokenizer is a
byte-level BPE with single digits, llama.cpp's pre-tokenizer `smollm`.

## Held-out modules
One document is a module, or a package's modules joined.

{held_out}

## Licence
The weights are under Apache-2.0. They were learned from source files of the Python standard library, which are under
the Python Software Foundation License Version 2; no text of those files is in this folder.
"""
