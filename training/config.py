"""What a fine-tuning run is asked to do, as one frozen record; the fields that decide the weights have names of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from longrope_export.errors import LongRopeError
from longrope_export.lengths import is_length

PositionsName = Literal["full", "pose", "segments", "random", "mixed"]
AttentionName = Literal["full", "s2", "scca"]
Train = Literal["full", "lora", "lora-plus"]
Schedule = Literal["constant", "linear", "cosine"]
Dtype = Literal["auto", "float32", "bfloat16"]
Packing = Literal["best-fit", "first-fit"]
Ends = Literal["auto", "always", "never"]
Shifts = Literal["fixed", "flow"]

# AdamW as in PI, YaRN, LongRoPE and LongLoRA (arXiv 2306.15595, 2309.00071, 2402.13753, 2309.12307).
ADAM_BETAS = (0.9, 0.95)
FULL_RATE = 2e-5
# ProLong's share of tokens in long rows (arXiv 2410.02660), for rows of both kinds.
MIXED_LONG_SHARE = 0.6
# An adapter starts at zero and is a small part of the weights: ten times the rate, as peft's users and papers do.
LORA_RATE = 2e-4

# Documents that perplexity is measured on, where nothing else is asked for.
HELD_DOCUMENTS = 4

# Fields that change speed, memory, places or reports, never the weights (beyond the last bits of a float).
NEUTRAL = frozenset({
    "model", "data", "out", "scaling", "cache", "micro_batch", "gradient_checkpointing", "save_every", "eval_data",
    "eval_every", "log_every", "report_to", "threads",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One run.

    `scaling` None takes the record that the model carries; `length` is the tokens of a training row, such as `16k` or
    `2x` (None: what suits `positions`). `batch` counts rows a step over all processes, `micro_batch` those that one
    process computes at once. `learning_rate` None is `FULL_RATE`, or `LORA_RATE` for LoRA; `lora_targets` empty are the
    family's attention projections. `chunks` and `text_offsets` are PoSE's, `alpha` is a segment's share of the row,
    `group_share` that of an S² or SCCA group. `long_share` (None: all, or `MIXED_LONG_SHARE` for mixed), `packing` and
    `cut_longer` are `RowOptions`', `field`, `bos` and `eos` `prepare`'s; `cache` keeps tokens for other runs (None:
    inside `out`). Held-out documents are the first of `eval_data`, or `eval_documents` of `data` (None:
    `HELD_DOCUMENTS`, where there are enough long ones). Raises `LongRopeError` for values out of range.
    """

    model: Path
    data: tuple[Path, ...]
    out: Path
    field: str = "text"
    bos: Ends = "auto"
    eos: Ends = "auto"
    cache: Path | None = None
    scaling: Path | None = None
    positions: PositionsName = "full"
    chunks: int = 2
    text_offsets: bool = False
    alpha: float = 0.25
    long_share: float | None = None
    packing: Packing = "best-fit"
    cut_longer: bool = False
    attention: AttentionName = "full"
    group_share: float = 0.25
    shifts: Shifts = "fixed"
    train: Train = "full"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    length: str | None = None
    steps: int = 400
    batch: int = 32
    micro_batch: int = 1
    learning_rate: float | None = None
    schedule: Schedule = "linear"
    warmup: int = 20
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw_torch"
    seed: int = 0
    dtype: Dtype = "auto"
    gradient_checkpointing: bool = True
    save_every: int = 50
    eval_data: tuple[Path, ...] = ()
    eval_documents: int | None = None
    eval_every: int = 50
    log_every: int = 1
    report_to: tuple[str, ...] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, kind in (
            ("positions", PositionsName), ("attention", AttentionName), ("train", Train), ("schedule", Schedule),
            ("dtype", Dtype), ("packing", Packing), ("shifts", Shifts),
            ("bos", Ends), ("eos", Ends),
        ):  # fmt: skip
            _one_of(name, getattr(self, name), get_args(kind))
        if not self.data:
            raise LongRopeError("--data is missing: name the texts to train on")
        for name in ("lora_rank", "steps", "batch", "micro_batch", "save_every", "eval_every", "log_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("warmup", "seed"):
            _at_least(name, getattr(self, name), 0)
        if self.eval_documents is not None:
            _at_least("eval_documents", self.eval_documents, 0)
        _at_least("chunks", self.chunks, 2)
        if self.threads is not None:
            _at_least("threads", self.threads, 1)
        _within("alpha", self.alpha, 0.0, 1.0)
        _within("group_share", self.group_share, 0.0, 1.0)
        if self.long_share is not None:
            _within("long_share", self.long_share, 0.0, 1.0, open_below=False)
        _within("lora_dropout", self.lora_dropout, 0.0, 0.999, open_below=False)
        for name in ("lora_alpha", "learning_rate"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 0.0, math.inf)
        for name in ("weight_decay", "clip"):
            _within(name, getattr(self, name), 0.0, math.inf, open_below=False)
        if self.length is not None and not is_length(self.length):
            raise LongRopeError(f"--length is {self.length!r}; write 16384, 32k or 2x")
        if self.batch % self.micro_batch:
            raise LongRopeError(
                f"--micro-batch {self.micro_batch} does not divide --batch {self.batch}: rows a step must come in "
                "whole micro-batches"
            )

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        if self.learning_rate is not None:
            return self.learning_rate
        return FULL_RATE if self.train == "full" else LORA_RATE

    @property
    def share_of_long_rows(self) -> float:
        """The share of tokens in long rows that is used."""
        if self.long_share is not None:
            return self.long_share
        return MIXED_LONG_SHARE if self.positions == "mixed" else 1.0

    @property
    def held_documents(self) -> int:
        """How many documents are measured at most."""
        return HELD_DOCUMENTS if self.eval_documents is None else self.eval_documents

    def deciding(self) -> dict[str, Any]:
        """JSON-ready options that decide the weights, by their names on the command line."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in NEUTRAL}
        values |= {"learning_rate": self.rate, "long_share": self.share_of_long_rows}
        return {option_name(name): _plain(value) for name, value in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """Every option, JSON-ready."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}


def option_name(name: str) -> str:
    """A field's name on the command line."""
    return f"--{name.replace('_', '-')}"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LongRopeError(f"{option_name(name)} is {value!r}; choose {', '.join(known)}")


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise LongRopeError(f"{option_name(name)} is {value!r}; it must be a whole number of at least {least}")


def _within(name: str, value: Any, low: float, high: float, *, open_below: bool = True) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number or value > high or value < low or (open_below and value == low):
        bound = f"above {low:g}" if open_below else f"at least {low:g}"
        limit = "" if math.isinf(high) else f" and at most {high:g}"
        raise LongRopeError(f"{option_name(name)} is {value!r}; it must be a number {bound}{limit}")
