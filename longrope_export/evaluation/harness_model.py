"""An engine of `longrope eval` as a model of lm-evaluation-harness; importing this module imports the harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.model import TemplateLM

from longrope_export.errors import LongRopeError
from longrope_export.evaluation.documents import bos_ids, encode
from longrope_export.evaluation.engines import RowEngine
from longrope_export.evaluation.rows import ModelRow

# What the harness generates where a task does not say.
DEFAULT_GENERATED = 256
_LIKELIER_THAN_ALL_OTHERS = float(np.log(2.0))


class EngineLM(TemplateLM):  # type: ignore[misc]
    """The harness' questions to a row of the evaluation: every sequence is rotated as its own length asks for.

    `truncated` counts the sequences that were longer than `max_length` and lost their beginning, as in the harness.
    """

    def __init__(self, engine: RowEngine, row: ModelRow, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.engine, self.row, self.tokenizer, self.max_length = engine, row, tokenizer, max_length
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """BOS, else EOS: what stands before a text without context."""
        return bos_ids(self.tokenizer)[0] if bos_ids(self.tokenizer) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness' own records."""
        return str(getattr(self.tokenizer, "name_or_path", ""))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, after BOS if the tokenizer has one, unless `add_special_tokens` is False."""
        front = [] if add_special_tokens is False else bos_ids(self.tokenizer)
        return [*front, *encode(self.tokenizer, string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return [self._log_likelihood(context, continuation) for _, context, continuation in requests]

    def _log_likelihood(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        ids = self._cut([*context, *continuation], self.max_length)
        first = len(ids) - len(continuation)
        if first < 1:
            raise LongRopeError(
                f"an answer of {len(continuation):,} tokens leaves no context within {self.max_length:,}; "
                "ask for a longer length"
            )
        self._rotate(len(ids))
        losses = self.engine.losses(ids, first)
        # A token with more than half of the probability is the likeliest: no second pass is needed to know.
        greedy = bool((losses < _LIKELIER_THAN_ALL_OTHERS).all()) or (
            self.engine.choices(ids, first).tolist() == ids[first:]
        )
        return -float(losses.sum(dtype=np.float64)), greedy

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, each token with at most `max_length` before it."""
        return [self._rolling(request.args[0]) for request in requests]

    def _rolling(self, text: str) -> float:
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text, add_special_tokens=False),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length - 1,
            context_len=1,
        )
        return sum(self._log_likelihood(*utils.make_disjoint_window(window))[0] for window in windows)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to the first stop text; raises `LongRopeError` for a task that samples."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") and settings.get("temperature") != 0.0:
            raise LongRopeError("this harness task samples its answers; only greedy ones are repeatable here")
        count = int(settings.get("max_gen_toks", settings.get("max_new_tokens", DEFAULT_GENERATED)))
        if count >= self.max_length:
            raise LongRopeError(f"this harness task generates {count:,} tokens; ask for a length above that")
        ids = self._cut(self.tok_encode(context), self.max_length - count)
        self._rotate(len(ids) + count)
        text = str(self.tokenizer.decode(self.engine.generate(ids, count), skip_special_tokens=True))
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            text = text.split(stop)[0] if stop else text
        return text

    def _cut(self, ids: list[int], most: int) -> list[int]:
        self.truncated += len(ids) > most
        return ids[-most:]

    def _rotate(self, length: int) -> None:
        self.engine.rotate(self.row, self.row.factor_set(length), length)
