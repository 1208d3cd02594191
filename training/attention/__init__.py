"""Attention while training: within documents, and LongLoRA's and SCCA's cheap patterns, without a [T, T] mask."""

from longrope_export.training.attention.pattern import Pattern
from longrope_export.training.attention.register import NAMES, training_attention, use_attention

__all__ = ["NAMES", "Pattern", "training_attention", "use_attention"]
