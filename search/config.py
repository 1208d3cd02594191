"""What a search is asked to do, as one frozen record; `resolve` fills in what depends on the model and the strategy."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from longrope_export.errors import LongRopeError, ScalingError
from longrope_export.rope.formulas import longrope_attention_factor, yarn_attention_factor
from longrope_export.rope.methods import METHODS
from longrope_export.search.space import START_TOKENS, RopeNumbers
from longrope_export.search.strategies.evolution import EvolutionOptions
from longrope_export.search.strategies.gradient import GradientOptions

StrategyName = Literal["gradient", "evolution"]
Runtime = Literal["auto", "hf", "gguf"]
Short = Literal["search", "original"]

# The descent's n̂: a subset of the paper's grid, because the factors are already found when it is tried.
FEW_START_TOKENS = (4, 16, 64, 256)
BASELINES = ("yarn", "ntk", "pi", "critical-dim")
# Used when no budget is given: at most this long, and at most this many evaluations.
DEFAULT_SECONDS = 45 * 60.0
DEFAULT_EVALUATIONS: Mapping[str, float] = MappingProxyType({"gradient": 120.0})


@dataclass(frozen=True)
class Budget:
    """Seconds or evaluations; both None asks for the default."""

    seconds: float | None = None
    evaluations: float | None = None


def parse_budget(text: str | None) -> Budget:
    """`90s`, `45m`, `1.5h` are times; a plain number is a number of evaluations. Raises `LongRopeError` otherwise."""
    if text is None:
        return Budget()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip().lower())
    if not match or float(match[1]) <= 0.0:
        raise LongRopeError(
            f"the budget {text!r} is not known; write a time (90s, 45m, 1.5h) or a number of evaluations"
        )
    amount = float(match[1])
    if match[2]:
        return Budget(seconds=amount * {"s": 1.0, "m": 60.0, "h": 3600.0}[match[2]])
    return Budget(evaluations=amount)


@dataclass(frozen=True, kw_only=True)
class SearchConfig:
    """One search. Paths are for `run_search` only; `search_factors` is given the model and the token rows.

    `attention` is "method" (each closed form's own), "su" (√(1 + ln s / ln L)), "yarn" (0.1 ln s + 1) or a number. None
    in `attention`, `learn_attention` and `start_tokens` takes what suits the strategy and the runtime. `bound` is a
    multiple of s. Raises `LongRopeError` for values out of range.
    """

    model: Path | None = None
    target: str = "4x"
    data: tuple[Path, ...] = ()
    out: Path | None = None
    strategy: StrategyName = "gradient"
    budget: str | None = None
    documents: int = 4
    validation_documents: int = 2
    seed: int = 0
    runtime: Runtime = "auto"
    dtype: str = "auto"
    threads: int | None = None
    attention: str | None = None
    learn_attention: bool | None = None
    init: Path | str | None = None
    baselines: tuple[str, ...] = BASELINES
    bound: float = 1.25
    step: float = 0.01
    start_tokens: tuple[int, ...] | None = None
    short: Short = "search"
    short_share: float = 0.1
    short_margin: float = 0.002
    evolution: EvolutionOptions = field(default_factory=EvolutionOptions)
    gradient: GradientOptions = field(default_factory=GradientOptions)

    def __post_init__(self) -> None:
        parse_budget(self.budget)
        _one_of("strategy", self.strategy, get_args(StrategyName))
        _one_of("--for", self.runtime, get_args(Runtime))
        _one_of("--short", self.short, get_args(Short))
        for name in self.baselines:
            _one_of("a closed form", name, tuple(METHODS))
        for name in ("documents", "validation_documents"):
            if getattr(self, name) < 1:
                raise LongRopeError(f"{name.replace('_', ' ')} is {getattr(self, name)}; at least 1 is needed")
        if not self.baselines:
            raise LongRopeError("at least one closed form is needed to begin with and to compare with")
        if not 0.0 <= self.short_share < 0.9:
            raise LongRopeError(f"the short search's share is {self.short_share}; it must be from 0 to below 0.9")
        if not self.short_margin >= 0.0:
            raise LongRopeError(f"the short search's margin is {self.short_margin}; it must be at least 0")
        if self.seed < 0:
            raise LongRopeError(f"the seed is {self.seed}; it must be at least 0")

    def resolve(self, numbers: RopeNumbers, kind: str) -> SearchConfig:
        """The same search with nothing left open, for a model of `kind` "hf" or "gguf".

        Raises `LongRopeError` for start tokens, which a GGUF cannot hold.
        """
        runtime: Runtime = ("gguf" if kind == "gguf" else "hf") if self.runtime == "auto" else self.runtime
        attention = self.attention or _default_attention(runtime, self.strategy)
        learn = (runtime == "hf") if self.learn_attention is None else self.learn_attention
        starts = self.start_tokens
        if starts is None:
            starts = (
                (0,) if runtime == "gguf" else START_TOKENS if self.strategy == "evolution" else (0, *FEW_START_TOKENS)
            )
        starts = tuple(dict.fromkeys((0, *(value for value in starts if value < numbers.target))))
        resolved = replace(self, runtime=runtime, attention=attention, learn_attention=learn, start_tokens=starts)
        if runtime == "gguf":
            _check_gguf(resolved)
        resolved.attention_factor(numbers)
        return resolved

    def attention_factor(self, numbers: RopeNumbers) -> float | None:
        """The attention factor that every candidate begins with; None for each closed form's own."""
        if self.attention == "method":
            return None
        if self.attention == "su":
            return longrope_attention_factor(numbers.scale, numbers.window)
        if self.attention == "yarn":
            return yarn_attention_factor(numbers.scale)
        try:
            value = float(self.attention or "")
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0.0):
            raise ScalingError(
                f"the attention factor {self.attention!r} is not known; write method, su, yarn or a number"
            )
        return value

    def to_header(self) -> dict[str, Any]:
        """JSON-ready form for the journal, without paths: the model's and the data's hashes stand for those."""
        values = asdict(self)
        for name in ("model", "data", "out", "threads", "init"):
            del values[name]
        return values


def _default_attention(runtime: str, strategy: str) -> str:
    if runtime == "gguf":
        return "1.0"
    return "su" if strategy == "evolution" else "method"


def _check_gguf(config: SearchConfig) -> None:
    if config.start_tokens != (0,):
        raise LongRopeError("a GGUF cannot hold start tokens: leave --start-tokens out, or search with --for hf")


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LongRopeError(f"{what} is {value!r}; choose {', '.join(known)}")
