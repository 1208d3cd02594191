"""What a recipe measures around its stages: perplexity and passkeys of one model under several records, by length."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from longrope_export.description import describe
from longrope_export.evaluation.documents import Row, evaluation_rows, load_tokenizer
from longrope_export.evaluation.passes import fixed_set
from longrope_export.evaluation.passkey import evaluate_passkey
from longrope_export.evaluation.tables import compare_methods
from longrope_export.files import write_text
from longrope_export.fingerprint import fingerprint
from longrope_export.lengths import resolve_length
from longrope_export.loader import load
from longrope_export.recipe.schema import ReportPlan
from longrope_export.scaling import MAX_LENGTH, RopeScaling

UNCHANGED = "unchanged"
_MEASURES = ("perplexity", "short", "passkeys")


@dataclass(frozen=True)
class Measurer:
    """Report texts and lengths of one recipe; `window` is the given model's, which `4x` refers to.

    `kept` is a folder for what each record was measured at, so that no later stage measures the same once more; `sums` are
    those of the texts.
    """

    plan: ReportPlan
    texts: Sequence[Path]
    window: int
    seed: int
    kept: Path
    sums: Sequence[str] = ()

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
        print_of_model = fingerprint(path)
        files = {name: self._file(print_of_model, lengths, scaling) for name, scaling in scalings.items()}
        missing = {name: scaling for name, scaling in scalings.items() if not files[name].exists()}
        if missing:
            for name, found in self._measure(path, lengths, missing).items():
                write_text(files[name], json.dumps(found) + "\n", overwrite=True)
        kept = {name: json.loads(file.read_text("utf-8")) for name, file in files.items()}
        return {
            "lengths": lengths,
            "documents": next(iter(kept.values()))["documents"],
            **{what: {name: found[what] for name, found in kept.items()} for what in _MEASURES},
        }

    def _file(self, model: str, lengths: Sequence[int], scaling: RopeScaling | None) -> Path:
        record = None if scaling is None else {**scaling.to_dict(), "provenance": None}
        what = [model, self.window, list(lengths), self.seed, asdict(self.plan), list(self.sums), record]
        return self.kept / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()}.json"

    def _measure(
        self, path: Path, lengths: Sequence[int], scalings: Mapping[str, RopeScaling | None]
    ) -> dict[str, dict[str, Any]]:
        model, tokenizer = load(path), load_tokenizer(path)
        rows = [Row(row.name, row.token_ids[: max(lengths)]) for row in self.rows(path)]
        compared = compare_methods(model, rows, lengths, scalings, window=self.window)
        return {
            name: {
                "documents": list(compared.documents),
                "perplexity": {str(length): _number(compared.perplexity(name, length)) for length in lengths},
                "short": _number(compared.short_perplexity(name)),
                "passkeys": self._passkeys(model, tokenizer, lengths, scaling),
            }
            for name, scaling in scalings.items()
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
