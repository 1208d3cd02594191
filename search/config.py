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
from longrope_export.evaluation.needles import needle_fits
from longrope_export.rope.formulas import longrope_attention_factor, yarn_attention_factor
from longrope_export.rope.methods import METHODS
from longrope_export.search.mixture import AUTO, LAST_SHARE, PERPLEXITY, WITH_NEEDLES, Mixture
from longrope_export.search.space import START_TOKENS, RopeNumbers
from longrope_export.search.strategies.cmaes import CmaOptions
from longrope_export.search.strategies.critical_dimension import critical_indices
from longrope_export.search.strategies.evolution import EvolutionOptions
from longrope_export.search.strategies.gradient import GradientOptions

StrategyName = Literal["gradient", "evolution", "critical-dim", "cmaes"]
Optimiser = Literal["gradient", "cmaes", "evolution"]
Runtime = Literal["auto", "hf", "gguf"]
Short = Literal["search", "original"]
ExecutorName = Literal["local", "processes", "ray"]
# In the objective's list: not torch but llama.cpp measures.
LLAMACPP = "llamacpp"

# The descent's n̂: a subset of the paper's grid, because the factors are already found when it is tried.
FEW_START_TOKENS = (4, 16, 64, 256)
BASELINES = ("yarn", "ntk", "pi", "critical-dim")
# Used when no budget is given: at most this long, and at most this many forward passes on documents.
DEFAULT_SECONDS = 45 * 60.0
DEFAULT_PASSES: Mapping[str, float] = MappingProxyType({"gradient": 480.0, "cmaes": 1600.0})
# Documents are free for a descent, which takes a few of them a step: more of them fit less to any. The paper's
# samples for populations, which measure every candidate on all of them.
MOST_DOCUMENTS: Mapping[str, int] = MappingProxyType({"gradient": 64, "cmaes": 5, "evolution": 5})
# The largest λ as a multiple of s: LongRoPE's, and of LongRoPE2's population.
LARGEST, LARGEST_ABOVE_CRITICAL = 1.25, 2.0
# The paper takes three samples beyond 512k tokens instead of five.
LARGE_DOCUMENTS = 3


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
    in `attention`, `learn_attention`, `start_tokens`, `critical_indices`, `race` and `bound` takes what suits the strategy,
    the model and the runtime. `learn_short_attention` searches the short set's attention factor too. `bound` is a multiple
    of s, `short_bound` a λ. `documents` 0 takes as many as there are, up to `MOST_DOCUMENTS`. `optimiser` is what moves
    the factors of strategy "critical-dim". `objective` is
    "name=weight,…" (see `mixture`) or "auto"; `sets` are lengths in between, each with a set of its own; a descent makes its
    first `early_share` steps on pieces of `early_length`. `keep_long` keeps the long set of `init` and searches the sets for
    shorter sequences alone. `device_map` and `max_memory` are `placement_options`'. `command` is what a report shows.
    Raises `LongRopeError` for values out of range.
    """

    model: Path | None = None
    target: str = "4x"
    data: tuple[Path, ...] = ()
    out: Path | None = None
    strategy: StrategyName = "gradient"
    optimiser: Optimiser = "gradient"
    critical_indices: tuple[int, ...] | None = None
    race: bool | None = None
    budget: str | None = None
    documents: int = 0
    validation_documents: int = 2
    report_documents: int = 0
    objective: str = AUTO
    last_share: float = LAST_SHARE
    seed: int = 0
    runtime: Runtime = "auto"
    dtype: str = "auto"
    threads: int | None = None
    executor: ExecutorName = "local"
    workers: int | None = None
    device_map: str | None = None
    max_memory: str | None = None
    command: str | None = None
    attention: str | None = None
    learn_attention: bool | None = None
    learn_short_attention: bool = False
    init: Path | str | None = None
    keep_long: bool = False
    baselines: tuple[str, ...] = BASELINES
    bound: float | None = None
    step: float = 0.01
    start_tokens: tuple[int, ...] | None = None
    short: Short = "search"
    short_share: float = 0.1
    short_margin: float = 0.002
    short_bound: float = 2.0
    sets: tuple[str, ...] = ()
    sets_share: float = 0.1
    early_length: str | None = None
    early_share: float = 0.75
    evolution: EvolutionOptions = field(default_factory=EvolutionOptions)
    gradient: GradientOptions = field(default_factory=GradientOptions)
    cmaes: CmaOptions = field(default_factory=CmaOptions)

    def __post_init__(self) -> None:
        parse_budget(self.budget)
        self.mixture  # noqa: B018 - raises for an objective that is not known
        _one_of("strategy", self.strategy, get_args(StrategyName))
        _one_of("optimiser", self.optimiser, get_args(Optimiser))
        _one_of("--for", self.runtime, get_args(Runtime))
        _one_of("--short", self.short, get_args(Short))
        _one_of("--executor", self.executor, get_args(ExecutorName))
        _check("workers", self.workers, self.worker_count >= 1, "at least 1")
        for name in self.baselines:
            _one_of("a closed form", name, tuple(METHODS))
        if not self.baselines:
            raise LongRopeError("at least one closed form is needed to begin with and to compare with")
        for name, least in (("documents", 0), ("validation_documents", 1), ("report_documents", 0), ("seed", 0)):
            _check(name, getattr(self, name), getattr(self, name) >= least, f"at least {least}")
        if self.keep_long and self.init is None:
            raise LongRopeError("--keep-long keeps the long set of a record: name it with --init")
        if self.keep_long and self.short == "original" and not self.sets:
            raise LongRopeError("--keep-long leaves nothing to search with --short original and no --sets")
        shares = self.short_share + self.sets_share * len(self.sets)
        _check("short_share", self.short_share, 0.0 <= self.short_share < 0.9, "from 0 to below 0.9")
        _check("sets_share", self.sets_share, self.sets_share > 0.0 and shares < 0.9, "above 0, all sets below 0.9")
        _check("early_share", self.early_share, 0.0 < self.early_share < 1.0, "between 0 and 1")
        _check("short_margin", self.short_margin, self.short_margin >= 0.0, "at least 0")
        _check("short_bound", self.short_bound, self.short_bound >= 1.0 + self.step, "at least 1 + step")

    @property
    def method(self) -> str:
        """The optimiser that moves the factors: "gradient", "evolution" or "cmaes"."""
        return self.optimiser if self.strategy == "critical-dim" else self.strategy

    @property
    def bound_multiple(self) -> float:
        """`bound`, or the paper's where none is given."""
        if self.bound is not None:
            return self.bound
        return LARGEST_ABOVE_CRITICAL if (self.strategy, self.method) == ("critical-dim", "evolution") else LARGEST

    @property
    def mixture(self) -> Mixture:
        """The objective's parts and weights."""
        names = [name for name in self.objective.split(",") if name.strip() != LLAMACPP]
        return Mixture.parse(",".join(names) if names and names != [AUTO] else PERPLEXITY, self.last_share)

    @property
    def engine(self) -> str:
        """What measures: "llamacpp" where the objective names it, else "torch"."""
        return LLAMACPP if LLAMACPP in map(str.strip, self.objective.split(",")) else "torch"

    @property
    def worker_count(self) -> int:
        """Workers of the executor: two unless given."""
        return 2 if self.workers is None else self.workers

    def with_texts(self, rows: int, tokenizer: Any, target: int) -> SearchConfig:
        """The same search with `documents` and `objective` filled in: `rows` of `target` tokens are at hand in all.

        The objective "auto" has needles where they fit and there is a tokenizer; Algorithm 1 is the paper's.
        """
        left = rows - self.validation_documents - self.report_documents
        documents = self.documents or max(1, min(left, MOST_DOCUMENTS[self.method]))
        if self.objective != AUTO:
            return replace(self, documents=documents)
        needles = self.strategy != "evolution" and tokenizer is not None and needle_fits(tokenizer, target)
        return replace(self, documents=documents, objective=WITH_NEEDLES if needles else PERPLEXITY)

    @property
    def needed_rows(self) -> tuple[int, int]:
        """The fewest rows that will do, and the most that are used."""
        held = self.validation_documents + self.report_documents
        return held + (self.documents or 1), held + (self.documents or MOST_DOCUMENTS[self.method])

    def resolve(self, numbers: RopeNumbers, kind: str) -> SearchConfig:
        """The same search with nothing left open, for a model of `kind` "hf" or "gguf".

        Raises `LongRopeError` for start tokens, which a GGUF cannot hold.
        """
        runtime: Runtime = ("gguf" if kind == "gguf" else "hf") if self.runtime == "auto" else self.runtime
        attention = self.attention or _default_attention(runtime, self.method)
        learn = (runtime == "hf") if self.learn_attention is None else self.learn_attention
        race = self.method == "cmaes" if self.race is None else self.race
        resolved = replace(
            self, runtime=runtime, attention=attention, learn_attention=learn, race=race, bound=self.bound_multiple,
            start_tokens=self._start_tokens(runtime, numbers), critical_indices=self._critical_indices(numbers),
        )  # fmt: skip
        if runtime == "gguf":
            _check_gguf(resolved, numbers)
        if self.learn_short_attention and not (learn and self.method != "evolution" and self.short == "search"):
            raise LongRopeError(
                "--learn-short-attention needs a gradient or cmaes that learns the long set's attention factor, and "
                "--short search"
            )
        resolved.attention_factor(numbers)
        return resolved

    def _start_tokens(self, runtime: Runtime, numbers: RopeNumbers) -> tuple[int, ...]:
        starts = self.start_tokens
        if starts is None:
            starts = START_TOKENS if self.strategy == "evolution" else FEW_START_TOKENS
            starts = () if runtime == "gguf" else starts
        return tuple(dict.fromkeys((0, *(value for value in starts if value < numbers.target))))

    def _critical_indices(self, numbers: RopeNumbers) -> tuple[int, ...]:
        if self.strategy != "critical-dim":
            return ()
        chosen = self.critical_indices or critical_indices(numbers, every=self.method == "evolution")
        for index in chosen:
            _check("critical_index", index, 0 <= index < numbers.pairs, f"from 0 to {numbers.pairs - 1}")
        return chosen

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
        # Nor the executor and the placement: the result is the same on all of them; devices are the engine's.
        elsewhere = (
            "model", "data", "out", "threads", "init", "executor", "workers", "device_map", "max_memory", "command",
        )  # fmt: skip
        for name in elsewhere:
            del values[name]
        if not self.learn_short_attention:
            # Journals from before there was the option go on.
            del values["learn_short_attention"]
        return values


def _default_attention(runtime: str, method: str) -> str:
    if runtime == "gguf":
        return "1.0"
    return "su" if method == "evolution" else "method"


def _check_gguf(config: SearchConfig, numbers: RopeNumbers) -> None:
    if numbers.base_start_tokens:
        raise LongRopeError(
            f"the model's factors have {numbers.base_start_tokens} start tokens, which a GGUF cannot hold: "
            "search with --for hf"
        )
    if config.start_tokens != (0,):
        raise LongRopeError("a GGUF cannot hold start tokens: leave --start-tokens out, or search with --for hf")
    if config.learn_short_attention:
        raise LongRopeError(
            "a GGUF holds one attention factor for both sets: leave --learn-short-attention out, or search with --for hf"
        )
    if config.sets:
        raise LongRopeError("a GGUF holds no sets for lengths in between: leave --sets out, or search with --for hf")


def _check(name: str, value: object, right: bool, wanted: str) -> None:
    if not right:
        raise LongRopeError(f"{name.replace('_', ' ')} is {value}; it must be {wanted}")


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise LongRopeError(f"{what} is {value!r}; choose {', '.join(known)}")
