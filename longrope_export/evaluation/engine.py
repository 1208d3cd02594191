"""The engine that runs a model in transformers: one resident model whose rotation is exchanged from row to row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from longrope_export.errors import NumericalError, TextTooShortError, UnsupportedModelError
from longrope_export.evaluation.losses import check_head, head_logits, state_losses
from longrope_export.evaluation.prefill import chunk_for, growing_cache, state_chunks
from longrope_export.evaluation.rows import FactorSet, ModelRow
from longrope_export.loader import load, remove_switch
from longrope_export.placement import input_device
from longrope_export.rotary import FixedRotary, decoder_of, replace_rotary, rope_theta_of, rotary_dim_of

Ids = Sequence[int] | npt.NDArray[np.int64]
# Positions that lm_head runs on at a time.
LOGITS_CHUNK = 512


class TransformersEngine:
    """A model in memory. `prefill_chunk` tokens go through it at a time (0: whole rows; None: by the length)."""

    runtime = "transformers"

    def __init__(self, model: Any, tokenizer: Any = None, prefill_chunk: int | None = None) -> None:
        self.model, self.tokenizer, self.prefill_chunk = model, tokenizer, prefill_chunk
        self._own: nn.Module | None = None

    @classmethod
    def open(
        cls, path: Path, tokenizer: Any, *, carries_record: bool, dtype: str | None, prefill_chunk: int | None
    ) -> TransformersEngine:
        """The engine on the weights of a folder or GGUF; every rotation is chosen by `rotate`."""
        keywords: dict[str, Any] = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        model = load(path, switch="long" if carries_record else "sequence", **keywords)
        remove_switch(model)
        return cls(model, tokenizer, prefill_chunk)

    def rotate(self, row: ModelRow, factors: FactorSet, length: int) -> None:
        """Compute with `factors` from now on."""
        if factors.factors is None:
            self.restore()
            return
        rotary = FixedRotary(rope_theta_of(self.model), rotary_dim_of(self.model))
        rotary.set_factors(torch.tensor(factors.factors), factors.attention_factor, factors.start_tokens)
        before = replace_rotary(self.model, rotary)
        self._own = self._own or before

    def close(self) -> None:
        """Forget the model."""
        del self.model

    def restore(self) -> None:
        """Rotate as the model did before the first `rotate`."""
        if self._own is not None:
            decoder_of(self.model).rotary_emb = self._own
            self._own = None

    def losses(self, token_ids: Ids, first: int = 1, offset: int = 0) -> npt.NDArray[np.float32]:
        """Cross entropy in nats of tokens `first`…, float32; see `protocol.Engine`."""
        ids = self._ids(token_ids)
        self._check(ids)
        found: list[Tensor] = []
        with torch.no_grad():
            for start, states in state_chunks(
                self.model, ids, chunk_for(ids.shape[1], self.prefill_chunk), offset=offset
            ):
                # The state of token i tells token i + 1.
                begin, end = max(start, first - 1), min(start + len(states), ids.shape[1] - 1)
                if begin < end:
                    targets = ids[0, begin + 1 : end + 1].to(states.device)
                    scored = states[begin - start : end - start]
                    found.append(state_losses(self.model, scored, targets, chunk=LOGITS_CHUNK).cpu())
        values: npt.NDArray[np.float32] = torch.cat(found).numpy()
        if not np.isfinite(values).all():
            raise NumericalError(not_finite(values, first))
        return values

    def choices(self, token_ids: Ids, first: int) -> npt.NDArray[np.int64]:
        """The argmax in the places `first`…, int64; see `protocol.Engine`."""
        ids = self._ids(token_ids)
        self._check(ids)
        found: list[Tensor] = []
        with torch.no_grad():
            for start, states in state_chunks(self.model, ids, chunk_for(ids.shape[1], self.prefill_chunk)):
                begin, end = max(start, first - 1), min(start + len(states), ids.shape[1] - 1)
                for part in torch.split(states[max(0, begin - start) : max(0, end - start)], LOGITS_CHUNK):
                    found.append(self._argmax(part).cpu())
        return torch.cat(found).numpy()

    def generate(self, prompt_ids: Sequence[int], count: int) -> list[int]:
        """Greedy continuation by at most `count` token ids; it ends before EOS."""
        ids = self._ids(prompt_ids)
        self._check(ids)
        cache = growing_cache(self.model, ids.shape[1] + count)
        chunk = chunk_for(ids.shape[1], self.prefill_chunk)
        ends = self._end_ids()
        answer: list[int] = []
        with torch.no_grad():
            while len(answer) < count:
                for _, states in state_chunks(self.model, ids, chunk, cache=cache):
                    last = states[-1:]
                token = int(self._argmax(last)[0])
                if token in ends:
                    break
                answer.append(token)
                ids = torch.tensor([[token]], device=ids.device)
        return answer

    def _argmax(self, states: Tensor) -> Tensor:
        logits = head_logits(self.model, states)
        if not torch.isfinite(logits).all():
            raise NumericalError("the model gives NaN or infinite logits; try --dtype float32 or other factors")
        return logits.argmax(-1)

    def _end_ids(self) -> set[int]:
        named = [getattr(self.model.generation_config, "eos_token_id", None)]
        named.append(getattr(self.tokenizer, "eos_token_id", None))
        return {
            int(entry)
            for value in named
            for entry in (value if isinstance(value, list) else [value])
            if entry is not None
        }

    def _ids(self, token_ids: Ids) -> Tensor:
        return torch.as_tensor(np.asarray(token_ids, dtype=np.int64), device=input_device(self.model))[None]

    def _check(self, ids: Tensor) -> None:
        check_vocabulary(ids[0].cpu().numpy(), self.model.get_input_embeddings().weight.shape[0])
        check_head(self.model)


def check_vocabulary(ids: npt.NDArray[np.int64], vocabulary: int) -> None:
    """Raise `UnsupportedModelError` when the ids are not all in the model's vocabulary."""
    if len(ids) < 2:
        raise TextTooShortError("a forward pass needs at least 2 tokens")
    if int(ids.max()) >= vocabulary or int(ids.min()) < 0:
        raise UnsupportedModelError(
            f"the tokenizer gives the id {int(ids.max())} and the model knows {vocabulary} tokens: "
            "they do not belong together"
        )


def not_finite(losses: npt.NDArray[np.floating[Any]], first: int = 1) -> str:
    """What to say when some of the `losses` of tokens `first`… are NaN or infinite."""
    place = int(np.flatnonzero(~np.isfinite(losses))[0]) + first + 1
    return f"the model gives a NaN or infinite loss at token {place:,}; try --dtype float32 or other factors"
