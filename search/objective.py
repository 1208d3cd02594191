"""The loss of a candidate on a document, and its gradient in log λ, through a resident frozen model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from longrope_export.evaluation.losses import (
    body_states,
    check_head,
    decoder_states,
    state_losses,
    state_losses_and_gradients,
)
from longrope_export.placement import input_device, is_offloaded
from longrope_export.rotary import FixedRotary, family_of, replace_rotary
from longrope_export.search.memory import CHUNK, activation_bytes
from longrope_export.search.mixture import Document, plain
from longrope_export.search.protocol import Outcome, Pass, Trial
from longrope_export.search.space import Candidate, RopeNumbers

Documents = Mapping[str, Sequence[npt.NDArray[np.int64] | Document]]

# Above this much memory for one layer-by-layer backward pass, layers are recomputed instead of kept.
KEPT_ACTIVATIONS_BYTES = 1 << 30
# Candidates are the rows of one pass where documents are this short, up to so many tokens in all, and the model is this
# small: beyond, rows gain little and leave workers idle (`benchmarks/batched_candidates.py`).
ROW_TOKENS, PASS_TOKENS, ROW_PARAMETERS = 128, 1024, 50_000_000


@dataclass(frozen=True)
class _Piece:
    """One forward pass: ids [1, T], the places whose next tokens count [n], those tokens and their weights."""

    ids: Tensor
    places: Tensor
    targets: Tensor
    weights: Tensor
    penalty: bool


class ModelObjective:
    """Weighted cross entropy of each document's tokens under a candidate; the model stays as it is otherwise.

    `documents` maps a part's name to documents; a row of token ids is one whose tokens 2…T count alike. `rows` says on
    the documents of which parts how many candidates are best measured in one pass. The model is
    frozen, put into evaluation mode, and its rotary embedding is replaced until `close`. Raises
    `UnsupportedModelError` when its family or its head is not known.
    """

    def __init__(
        self, model: nn.Module, numbers: RopeNumbers, documents: Documents, *, recompute: bool | None = None
    ) -> None:
        family_of(model)
        check_head(model)
        self.model = model.eval().requires_grad_(False)
        self._numbers = numbers
        self._rotary = FixedRotary(numbers.rope_theta, numbers.rotary_dim)
        self._before = replace_rotary(model, self._rotary)
        self._device = input_device(model)
        self._documents = {part: [_pieces(each) for each in rows] for part, rows in documents.items()}
        longest = max(map(_longest, self._documents.values()), default=1)
        # A backward pass without recomputation would also keep every weight that is brought from elsewhere.
        keep = activation_bytes(model, longest) <= KEPT_ACTIVATIONS_BYTES and not is_offloaded(model)
        self.recompute = not keep if recompute is None else recompute
        small = sum(weight.numel() for weight in model.parameters()) <= ROW_PARAMETERS
        lengths = {part: _longest(documents) for part, documents in self._documents.items()}
        self.rows = {part: PASS_TOKENS // length for part, length in lengths.items() if small and length <= ROW_TOKENS}
        self._unchanged: dict[int, float] = {}

    def measure(self, trial: Trial) -> Outcome:
        """The outcome of one trial."""
        if not trial.gradient:
            return self.measure_rows((trial,))[0]
        parts = [self._slope(each, trial.candidate) for each in self._documents[trial.part][trial.document]]
        loss = _finite(math.fsum(loss for loss, _ in parts))
        gradients = np.array([gradient for _, gradient in parts])
        return Outcome(loss, tuple(_finite(value) for value in gradients.sum(axis=0).tolist()))

    def measure_rows(self, trials: Pass) -> tuple[Outcome, ...]:
        """The outcomes of candidates on one document, no gradients: each is a row of one forward pass, with its own cos and sin."""
        document = self._documents[trials[0].part][trials[0].document]
        candidates = [trial.candidate for trial in trials]
        parts = [[self._above(piece, loss) for loss in self._losses(candidates, piece)] for piece in document]
        return tuple(Outcome(_finite(math.fsum(losses))) for losses in zip(*parts))

    def measure_prefix(self, candidate: Candidate, part: str, length: int, *, gradient: bool) -> None:
        """Run a pass on the first `length` tokens of the part's first document: for measuring time."""
        ids = self._documents[part][0][0].ids[0, :length].cpu().numpy()
        (prefix,) = _pieces(ids)
        if gradient:
            self._gradient(candidate, prefix)
        else:
            self._losses([candidate], prefix)

    def _slope(self, piece: _Piece, candidate: Candidate) -> tuple[float, list[float]]:
        loss, slope = self._gradient(candidate, piece)
        above = self._above(piece, loss)
        return above, [0.0] * len(slope) if piece.penalty and above <= 0.0 else slope

    def _above(self, piece: _Piece, loss: float) -> float:
        """The loss, or of a penalty what it is above that of the unchanged model."""
        if not piece.penalty:
            return loss
        if id(piece) not in self._unchanged:
            # Measured once by whoever needs it: the same number everywhere, so it is no part of the journal.
            (self._unchanged[id(piece)],) = self._losses([self._numbers.short_original()], piece)
        above = loss - self._unchanged[id(piece)]
        return 0.0 if above <= 0.0 else above

    def _losses(self, candidates: Sequence[Candidate], piece: _Piece) -> list[float]:
        self.apply(candidates)
        with torch.no_grad():
            ids = piece.ids.to(self._device).expand(len(candidates), -1)
            hidden = decoder_states(self.model, input_ids=ids)
            states = hidden[:, piece.places.to(hidden.device)].flatten(0, 1)
            targets = piece.targets.to(hidden.device).repeat(len(candidates))
            losses = state_losses(self.model, states, targets, chunk=CHUNK).view(len(candidates), -1)
        return [math.fsum(row) for row in (losses.cpu().double() * piece.weights).tolist()]

    def apply(self, candidates: Sequence[Candidate]) -> None:
        """Have the next forward pass apply each candidate to its row; a single one applies to every row."""
        numbers, start_tokens = self._numbers, [each.start_tokens for each in candidates]
        self._rotary.set_factors(
            torch.tensor([numbers.total_factors(each) for each in candidates], dtype=torch.float64),
            torch.tensor([numbers.total_attention_factor(each) for each in candidates], dtype=torch.float64),
            torch.tensor(start_tokens) if any(start_tokens) else 0,
        )

    def close(self) -> None:
        """Give the model its own rotary embedding back."""
        replace_rotary(self.model, self._before)

    def _apply(self, candidate: Candidate, offsets: Tensor) -> None:
        factors = torch.tensor(self._numbers.total_factors(candidate), dtype=torch.float64) * torch.exp(offsets[:-1])
        attention = self._numbers.total_attention_factor(candidate) * torch.exp(offsets[-1])
        self._rotary.set_factors(factors, attention, candidate.start_tokens)

    def _gradient(self, candidate: Candidate, piece: _Piece) -> tuple[float, list[float]]:
        # Offsets in (log λ …, log attention): their gradient at 0 is what the strategies descend on.
        offsets = torch.zeros(self._numbers.pairs + 1, dtype=torch.float64, requires_grad=True)
        self._apply(candidate, offsets)
        with _recomputed_layers(self.model, self.recompute):
            hidden = body_states(self.model, piece.ids.to(self._device))[0]
            states = hidden[piece.places.to(hidden.device)]
            targets, weights = piece.targets.to(states.device), piece.weights.to(states.device, torch.float32)
            losses, slopes, _ = state_losses_and_gradients(self.model, states.detach(), targets, chunk=CHUNK)
            # A token's loss depends on its own state alone.
            torch.autograd.backward(states, slopes.mul_(weights[:, None]))
        self.apply([candidate])
        assert offsets.grad is not None
        return math.fsum((losses.cpu().double() * piece.weights).tolist()), offsets.grad.tolist()


def _longest(documents: Sequence[Sequence[_Piece]]) -> int:
    return max((piece.ids.shape[1] for document in documents for piece in document), default=1)


def _pieces(document: npt.NDArray[np.int64] | Document) -> list[_Piece]:
    pieces = []
    for piece in plain(document) if isinstance(document, np.ndarray) else document:
        ids = torch.from_numpy(np.ascontiguousarray(piece.token_ids))
        places = torch.from_numpy(np.flatnonzero(piece.weights))
        weights = torch.from_numpy(piece.weights)[places]
        pieces.append(_Piece(ids[None], places, ids[places + 1], weights, piece.penalty))
    return pieces


@contextlib.contextmanager
def _recomputed_layers(model: nn.Module, active: bool) -> Iterator[None]:
    """While active, every layer keeps only its input and its attention's output; the rest is computed again.

    transformers does this in training mode only; the mode is set on the layers alone and not below them, so that no
    dropout runs.
    """
    layers = _checkpointable_layers(model) if active else []
    for layer in layers:
        layer.training = layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=_keeping_attention)
    # Stopping a layer in its middle, once the backward pass has what it needs, would leave a weight that accelerate
    # brought for it in memory.
    try:
        with set_checkpoint_early_stop(not is_offloaded(model)):
            yield
    finally:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = False


def _keeping_attention() -> tuple[Any, Any]:
    contexts: tuple[Any, Any] = create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]
    return contexts


def _policy(context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    # Attention grows with the square of the length, its output only with the length: it is worth keeping.
    name = str(operation)
    kept = name.startswith("aten._scaled_dot_product") and "backward" not in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _checkpointable_layers(model: nn.Module) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
