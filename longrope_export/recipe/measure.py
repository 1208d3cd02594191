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
from longrope_export.scaling import RopeScaling

UNCHANGED = "unchanged"


@dataclass(frozen=True)
class Measurer:
    """Report texts and lengths of one recipe; `window` is the given model's, which `4x` refers to."""

    plan: ReportPlan
    texts: Sequence[Path]
    window: int
    seed: int

    @property
    def lengths(self) -> list[int]:
        """Tokens, rising."""
        return sorted({resolve_length(length, self.window) for length in self.plan.lengths})

    def rows(self, model: Path) -> list[Row]:
        """The first tokens of every report document, as the model's tokenizer cuts them."""
        return evaluation_rows(self.texts, load_tokenizer(model), max(self.lengths), self.plan.documents)

    def measure(self, path: Path, scalings: Mapping[str, RopeScaling | None]) -> dict[str, Any]:
        """Perplexity by name and length (the long set; `short` at the window), and shares of passkeys found."""
        model, tokenizer = load(path), load_tokenizer(path)
        compared = compare_methods(model, self.rows(path), self.lengths, scalings, window=self.window)
        return {
            "lengths": self.lengths,
            "documents": list(compared.documents),
            "perplexity": {
                row.name: {str(length): _number(compared.perplexity(row.name, length)) for length in self.lengths}
                for row in compared.rows
            },
            "short": {row.name: _number(compared.short_perplexity(row.name)) for row in compared.rows},
            "passkeys": {name: self._passkeys(model, tokenizer, scaling) for name, scaling in scalings.items()},
        }

    def _passkeys(self, model: Any, tokenizer: Any, scaling: RopeScaling | None) -> dict[str, float]:
        if not self.plan.passkeys:
            return {}
        if scaling is None:
            found = evaluate_passkey(model, tokenizer, self.lengths, self.plan.passkeys, self.seed)
        else:
            with fixed_set(model, scaling, "long"):
                found = evaluate_passkey(model, tokenizer, self.lengths, self.plan.passkeys, self.seed)
        return {str(length): found.accuracy(length) or 0.0 for length in self.lengths}


def closed_forms(path: Path, target: int, names: Sequence[str]) -> dict[str, RopeScaling]:
    """Records of closed forms for `target` tokens, on top of what the model carries; its short set stays."""
    from longrope_export.search.run import numbers_of
    from longrope_export.search.space import closed_form

    numbers = numbers_of(describe(path), str(target))
    short = numbers.short_original()
    return {name: numbers.record(closed_form(name, numbers), short, {"method": name}) for name in names}


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
