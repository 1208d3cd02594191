"""Which engine runs a model: transformers, or llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from longrope_export.description import ModelDescription
from longrope_export.evaluation.protocol import Engine
from longrope_export.evaluation.rows import FactorSet, ModelRow

if TYPE_CHECKING:
    from longrope_export.evaluation.run import EvaluateOptions


class RowEngine(Engine, Protocol):
    """An engine whose rotation the run chooses before each unit."""

    def rotate(self, row: ModelRow, factors: FactorSet, length: int) -> None:
        """Compute sequences of `length` tokens with `factors` of `row` from now on."""
        ...

    def close(self) -> None:
        """Give the model's memory back."""
        ...


def open_engine(path: Path, model: ModelDescription, options: EvaluateOptions, tokenizer: Any) -> RowEngine:
    """The engine that `options` ask for, with the model in memory (llama.cpp: when it is first used)."""
    if options.runtime == "llamacpp":
        from longrope_export.evaluation.llamacpp_engine import LlamaCppEngine

        return LlamaCppEngine(path, tokenizer, options.threads)
    import torch

    from longrope_export.evaluation.engine import TransformersEngine

    if options.threads:
        torch.set_num_threads(options.threads)
    return TransformersEngine.open(
        path,
        tokenizer,
        carries_record=model.scaling is not None,
        dtype=options.dtype,
        prefill_chunk=options.prefill_chunk,
    )
