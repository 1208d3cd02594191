"""What an approximation costs: perplexity with a record's own factors and with what its keys make of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from longrope_export.converters.gguf.approximate import approximation
from longrope_export.errors import ScalingError
from longrope_export.scaling import RopeScaling

# More rows are slower, and change a ratio of two perplexities little.
_DOCUMENTS = 4


@dataclass(frozen=True)
class Cost:
    """Perplexities at one length in tokens, over `documents` rows: of the record, and of the approximation."""

    length: int
    exact: float
    approximated: float
    documents: int

    def __str__(self) -> str:
        ratio = self.approximated / self.exact
        return (
            f"perplexity at {self.length:,} tokens {self.approximated:.4g} instead of {self.exact:.4g} "
            f"({ratio:.3f} ×, {self.documents} rows)"
        )


def approximated_record(scaling: RopeScaling, method: str) -> RopeScaling:
    """The record that llama.cpp applies in the place of `scaling`: one set for every length."""
    divisors = tuple(approximation(method, scaling).divisors.tolist())
    factor = scaling.long_attention_factor
    return replace(
        scaling, long_factor=divisors, short_factor=divisors, short_attention_factor=factor, long_start_tokens=0,
        short_start_tokens=0, sets={},
    )  # fmt: skip


def approximation_cost(
    model: str | os.PathLike[str],
    scaling: RopeScaling,
    method: str,
    texts: Sequence[str | os.PathLike[str]],
    *,
    length: int | None = None,
) -> list[Cost]:
    """Perplexity on `texts` in the reference loader, at the window L (its short set) and at `length` (default: L').

    `model` is a folder or a GGUF file, which is dequantised. Raises `ScalingError` for a shorter
    length, and as `load` and `evaluation_rows`.
    """
    from longrope_export.evaluation.documents import evaluation_rows, load_tokenizer
    from longrope_export.evaluation.tables import compare_methods
    from longrope_export.loader import load

    window = scaling.original_max_position_embeddings
    if length is not None and length < window:
        raise ScalingError(f"{length:,} tokens are fewer than the window of {window:,}; measure at a longer length")
    lengths = sorted({window, length or scaling.max_position_embeddings})
    rows = evaluation_rows(texts, load_tokenizer(model), lengths[-1], at_most=_DOCUMENTS)
    records = {"exact": scaling, "approximated": approximated_record(scaling, method)}
    table = compare_methods(load(model), rows, lengths, records, window=window)
    return [
        Cost(
            measured,
            table.short_perplexity("exact") if measured <= window else table.perplexity("exact", measured),
            table.perplexity("approximated", measured),
            len(rows),
        )
        for measured in lengths
    ]
