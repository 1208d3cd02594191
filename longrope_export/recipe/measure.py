"""What a recipe measures around its stages: perplexity and passkeys of one model under several records, by length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.description import describe
from longrope_export.evaluation.documents import Row, evaluation_rows, load_tokenizer
from longrope_export.evaluation.passes import fixed_set
from longrope_export.evaluation.passkey import evaluate_passkey
from longrope_export.evaluation.tables import compare_methods
from longrope_export.lengths import resolve_length
from longrope_export.loader import load
from longrope_export.recipe.schema import ReportPlan
from longrope_export.scaling import MAX_LENGTH, RopeScaling

UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Measurer:
    """Report texts and lengths of one recipe; `window` is the given model's, which `4x` refers to."""

    plan: ReportPlan
    texts: Sequence[Path]
    window: int
    seed: int

    def lengths(self, target: int) -> list[int]:
        """Tokens, rising, up to the window and to `target`: what factors were not made for says nothing about them."""
        asked = {resolve_length(length, self.window) for length in self.plan.lengths}
        return sorted(length for length in asked if length <= max(target, self.window))

    def rows(self, model: Path) -> list[Row]:
        """The same report documents at every length, as the model's tokenizer cuts them."""
        longest = max(self.lengths(MAX_LENGTH))
        return evaluation_rows(self.texts, load_tokenizer(model), longest, self.plan.documents)

    def measure(self, path: Path, target: int, scalings: Mapping[str, RopeScaling | None]) -> dict[str, Any]:
        """Perplexity by name and length (the long set; `short` at the window), and shares of passkeys found."""
        lengths = self.lengths(target)
        if not lengths:
            return {}
        model, tokenizer = load(path), load_tokenizer(path)
        rows = [Row(row.name, row.token_ids[: max(lengths)]) for row in self.rows(path)]
        compared = compare_methods(model, rows, lengths, scalings, window=self.window)
        return {
            "lengths": lengths,
            "documents": list(compared.documents),
            "perplexity": {
                row.name: {str(length): _number(compared.perplexity(row.name, length)) for length in lengths}
                for row in compared.rows
            },
            "short": {row.name: _number(compared.short_perplexity(row.name)) for row in compared.rows},
            "passkeys": {
                name: self._passkeys(model, tokenizer, lengths, scaling) for name, scaling in scalings.items()
            },
        }

    def _passkeys(
        self, model: Any, tokenizer: Any, lengths: Sequence[int], scaling: RopeScaling | None
    ) -> dict[str, float]:
        if not self.plan.passkeys:
            return {}
        if scaling is None:
            found = evaluate_passkey(model, tokenizer, lengths, self.plan.passkeys, self.seed)
        else:
            with fixed_set(model, scaling, "long"):
                found = evaluate_passkey(model, tokenizer, lengths, self.plan.passkeys, self.seed)
        return {str(length): found.accuracy(length) or 0.0 for length in lengths}


def closed_forms(path: Path, target: int, names: Sequence[str]) -> dict[str, RopeScaling]:
    """Records of closed forms for `target` tokens, on top of what the model carries; its short set stays."""
    from longrope_export.search.run import numbers_of
    from longrope_export.search.space import closed_form

    numbers = numbers_of(describe(path), str(target))
    short = numbers.short_original()
    return {name: numbers.record(closed_form(name, numbers), short, {"method": name}) for name in names}


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
