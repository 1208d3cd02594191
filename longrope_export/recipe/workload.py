"""How much a fine-tuning stage trains on: rows and tokens, from its options alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longrope_export.lengths import resolve_length
from longrope_export.recipe.commands import parsed

if TYPE_CHECKING:
    from longrope_export.recipe.plan import Step


@dataclass(frozen=True)
class Workload:
    """`steps` of `rows` rows of `length` tokens each at a highest learning rate of `rate`."""

    steps: int
    rows: int
    length: int
    rate: float

    @property
    def tokens(self) -> int:
        """Tokens of the whole stage."""
        return self.steps * self.rows * self.length

    def __str__(self) -> str:
        return (
            f"{self.steps:,} steps of {self.rows} rows of {self.length:,} tokens, {self.tokens:,} in all, "
            f"learning rate {self.rate:g}"
        )


def workload(step: Step) -> Workload | None:
    """What a fine-tuning stage trains on; None for a search."""
    if step.stage.kind != "finetune":
        return None
    from longrope_export.cli.finetune import finetune_config

    config = finetune_config(parsed(step.words, step.stage.name))
    whole = config.positions in ("full", "mixed")
    length = (step.target if whole else step.window) if config.length is None else None
    return Workload(config.steps, config.batch, length or resolve_length(str(config.length), step.window), config.rate)
