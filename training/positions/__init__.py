"""How a row's documents are presented to the model: which of their tokens, at which positions, with which factors."""

from longrope_export.training.positions.example import IGNORED, Example
from longrope_export.training.positions.present import present
from longrope_export.training.positions.schemes import SCHEMES, Positions

__all__ = ["IGNORED", "SCHEMES", "Example", "Positions", "present"]
