"""The rotation of a model in training: each token turns with the short or the long set, as its example says."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from longrope_export.loader import remove_switch
from longrope_export.rotary import FixedRotary, LayerTypeRotary, core_of, rotary_module
from longrope_export.scaling import RopeScaling
from longrope_export.switching import RotarySets


class TrainingRotation:
    """Chooses the sets of a model that `load` or `apply_scaling` prepared for `scaling`; its own switch is taken out."""

    def __init__(self, model: Any, scaling: RopeScaling) -> None:
        core = core_of(model)
        remove_switch(core)
        module = rotary_module(core)
        rotary = module.full if isinstance(module, LayerTypeRotary) else module
        assert isinstance(rotary, FixedRotary)
        self.sets, self.rotary = RotarySets(scaling, rotary.angles), rotary
        self._short, self._long = self.sets.index(scaling.original_max_position_embeddings), len(self.sets.lengths)

    def choose(self, long: Tensor) -> None:
        """Rotate the next forward's tokens by `long`, bool [B, T]: true for the long set, false for that at the window."""
        self.rotary.current = self.sets.rows(long.long() * (self._long - self._short) + self._short)

    def choose_all(self, *, long: bool) -> None:
        """Rotate all tokens of the next forward with one set."""
        self.rotary.current = self.sets.long if long else self.sets.short
