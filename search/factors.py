"""The search of a model in memory: journal, plan, the long set, n̂, the short set, and the record that comes of it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import nn

from longrope_export import __version__
from longrope_export.errors import InputFileError, ScalingError
from longrope_export.fingerprint import fingerprint_model
from longrope_export.scaling import RopeScaling
from longrope_export.search.config import SearchConfig, parse_budget
from longrope_export.search.documents import SHORT_PIECES, Parts, rows_hash, split_rows
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors import InProcess
from longrope_export.search.journal import PLAN, Journal
from longrope_export.search.long import SEARCHED, LongResult, choose_start_tokens, search_long
from longrope_export.search.objective import ModelObjective
from longrope_export.search.plan import GRADIENT_UNITS, Plan, Sizes, Timing, make_plan
from longrope_export.search.probe import probe
from longrope_export.search.protocol import (
    SEARCH,
    SHORT_SEARCH,
    SHORT_VALIDATION,
    VALIDATION,
    Outcome,
    Trial,
)
from longrope_export.search.short import ShortResult, search_short
from longrope_export.search.space import Candidate, RopeNumbers


@dataclass(frozen=True)
class SearchResult:
    """The record found, and how: perplexities by candidate, what was spent, and remarks for the user.

    `evaluations` are forward units over all search documents (a gradient counts 3; a short pass L/L'),
    `validation_evaluations` the same units spent on the documents that only choose. `history` is the best loss after
    each generation, or the loss at each step.
    """

    scaling: RopeScaling
    chosen: str
    short_chosen: str
    search_perplexity: Mapping[str, float]
    validation_perplexity: Mapping[str, float]
    evaluations: float
    validation_evaluations: float
    history: tuple[float, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "scaling": self.scaling.to_dict(),
            "chosen": self.chosen,
            "short_chosen": self.short_chosen,
            "search_perplexity": _finite_values(self.search_perplexity),
            "validation_perplexity": _finite_values(self.validation_perplexity),
            "evaluations": self.evaluations,
            "validation_evaluations": self.validation_evaluations,
            "history": [value if math.isfinite(value) else None for value in self.history],
            "notes": list(self.notes),
        }


class Progress(Protocol):
    """Is told what a search does."""

    def plan(self, plan: Plan, sizes: Mapping[str, int], units: Mapping[str, float]) -> None:
        """The plan, the number of documents of each part, and what one forward pass on each part counts."""
        ...

    def observe(self, trial: Trial, outcome: Outcome, measured_now: bool) -> None:
        """One outcome, measured now or known from the journal."""
        ...


def search_factors(
    model: nn.Module,
    numbers: RopeNumbers,
    rows: Sequence[npt.ArrayLike],
    config: SearchConfig,
    journal_path: str | os.PathLike[str] | None = None,
    *,
    kind: str = "hf",
    fingerprint: str | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Search factors for a model in memory.

    `rows` are token ids, each at least L' long: the first `config.documents` are searched on, the next
    `config.validation_documents` choose. `kind` ("hf" or "gguf") says what `config.runtime` "auto" means. With
    `journal_path`, a search that was stopped there is continued. The model gets its own rotary embedding back.

    Raises `TextTooShortError`, `StaleStateError` when the journal is of another search, `UnsupportedModelError`,
    `LongRopeError` for options that do not fit the runtime or a budget that is too small.
    """
    resolved = config.resolve(numbers, kind)
    check_budget(resolved, numbers)
    init = read_init(resolved, numbers)
    parts = split_rows(
        rows, documents=config.documents, validation=config.validation_documents,
        window=numbers.window, target=numbers.target, bos=getattr(model.config, "bos_token_id", None),
    )  # fmt: skip
    objective = ModelObjective(model, numbers, parts)
    try:
        header = _header(model, numbers, resolved, parts, init, fingerprint or fingerprint_model(model))
        if journal_path is None:
            plan = _new_plan(objective, numbers, resolved, parts)
            return _Search(objective, None, numbers, resolved, plan, parts, header, progress).run(init)
        with Journal(Path(journal_path)) as journal:
            if journal.header is None:
                plan = _new_plan(objective, numbers, resolved, parts)
                journal.begin({**header, PLAN: plan.to_json()})
            else:
                journal.check(header)
                plan = Plan(**journal.header[PLAN])
            return _Search(objective, journal, numbers, resolved, plan, parts, header, progress).run(init)
    finally:
        objective.close()


class _Search:
    """One search that is ready to run: what the phases share."""

    def __init__(
        self,
        objective: ModelObjective,
        journal: Journal | None,
        numbers: RopeNumbers,
        config: SearchConfig,
        plan: Plan,
        parts: Parts,
        header: Mapping[str, Any],
        progress: Progress | None,
    ) -> None:
        sizes = {part: len(rows) for part, rows in parts.items()}
        if progress:
            progress.plan(plan, sizes, _units(numbers))
        self.evaluator = Evaluator(InProcess(objective), sizes, journal, progress.observe if progress else None)
        self.numbers, self.config, self.plan, self.header = numbers, config, plan, header

    def run(self, init: Candidate | None) -> SearchResult:
        """All phases in order."""
        seed = self.config.seed
        long = search_long(self.evaluator, self.numbers, self.config, self.plan, seed, init)
        tried: Mapping[int, float] = {}
        if self.config.strategy == "gradient":
            long, tried = choose_start_tokens(self.evaluator, long, self.config, self.plan)
        # A GGUF holds one attention factor, which short sequences get as well.
        shared = long.candidate.attention_factor if self.config.runtime == "gguf" else 1.0
        short = search_short(self.evaluator, self.numbers, self.config, self.plan, seed, shared)
        return self._result(long, tried, short)

    def _result(self, long: LongResult, tried: Mapping[int, float], short: ShortResult) -> SearchResult:
        searched, chosen_on = self._spent((SEARCH, SHORT_SEARCH)), self._spent((VALIDATION, SHORT_VALIDATION))
        short_chosen = "original" if short.candidate.factors == self.numbers.unchanged().factors else SEARCHED
        provenance = {
            "method": "search",
            "strategy": self.config.strategy,
            "seed": self.config.seed,
            "chosen": long.chosen,
            "evaluations": searched,
            "validation_evaluations": chosen_on,
            "search_perplexity": _finite_values(long.search),
            "validation_perplexity": _finite_values(long.validation),
            "start_tokens_perplexity": _finite_values({str(value): ppl for value, ppl in tried.items()}),
            "short": short_chosen,
            "short_perplexity": {"original": short.original_perplexity, "searched": short.searched_perplexity},
            **{name: value for name, value in self.header.items() if name not in ("strategy", "seed")},
        }
        return SearchResult(
            self.numbers.record(long.candidate, short.candidate, provenance), long.chosen, short_chosen,
            dict(long.search), dict(long.validation), searched, chosen_on, long.history, self._notes(long),
        )  # fmt: skip

    def _spent(self, parts: Sequence[str]) -> float:
        units = _units(self.numbers)
        total = sum(
            count * units[part] * (GRADIENT_UNITS if gradient else 1.0)
            for (part, gradient), count in sorted(self.evaluator.asked.items())
            if part in parts
        )
        return round(total / self.config.documents, 4)

    def _notes(self, long: LongResult) -> tuple[str, ...]:
        notes = []
        full = self.config.evolution.evaluations
        if self.config.strategy == "evolution" and self.plan.evaluations < full:
            notes.append(f"the budget stopped Algorithm 1 after {self.plan.evaluations:,} of its {full:,} evaluations")
        if long.chosen != SEARCHED:
            notes.append(f"on the validation documents {long.chosen} was not beaten; the record holds it")
        if self.config.short == "search" and not (self.plan.short_steps or self.plan.short_evaluations):
            notes.append("the budget is too small to search the short set; it is the original one")
        return tuple(notes)


def read_init(config: SearchConfig, numbers: RopeNumbers) -> Candidate | None:
    """The long set of `config.init` (a longrope.json) relative to the model's present factors, or None.

    Raises `InputFileError` when it cannot be read, `ScalingError` when it is for another model.
    """
    if config.init is None:
        return None
    try:
        record = RopeScaling.from_json(Path(config.init).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{config.init} cannot be read: {error}") from None
    if record.rotary_dim != numbers.rotary_dim:
        raise ScalingError(
            f"{config.init} has {record.rotary_dim // 2} factors, the model needs {numbers.pairs}: another model's"
        )
    factors = [total / base for total, base in zip(record.long_factor, numbers.base_factors)]
    given = config.attention_factor(numbers)
    attention = record.long_attention_factor / numbers.base_attention_factor if given is None else given
    start_tokens = 0 if config.runtime == "gguf" else record.long_start_tokens
    return Candidate(tuple(factors), attention, start_tokens)


def _new_plan(objective: ModelObjective, numbers: RopeNumbers, config: SearchConfig, parts: Parts) -> Plan:
    sizes = _sizes(config, numbers, {part: len(rows) for part, rows in parts.items()})
    return make_plan(config, sizes, lambda: probe(objective, numbers, config.strategy == "gradient"))


def _sizes(config: SearchConfig, numbers: RopeNumbers, documents: Mapping[str, int]) -> Sizes:
    values = len(config.start_tokens or (0,))
    return Sizes(
        documents=documents[SEARCH],
        validation=documents[VALIDATION],
        short_documents=documents[SHORT_SEARCH],
        short_validation=documents[SHORT_VALIDATION],
        baselines=len(config.baselines),
        starts=values if values > 1 else 0,
        short_ratio=1.0 / numbers.scale,
    )


def check_budget(config: SearchConfig, numbers: RopeNumbers) -> None:
    """Raise `LongRopeError` when a resolved configuration's number of evaluations does not pay for one step."""
    if parse_budget(config.budget).evaluations is None:
        return
    pieces = min(SHORT_PIECES, numbers.target // numbers.window)
    counts = {SEARCH: config.documents, VALIDATION: config.validation_documents}
    counts |= {SHORT_SEARCH: config.documents * pieces, SHORT_VALIDATION: config.validation_documents * pieces}
    make_plan(config, _sizes(config, numbers, counts), lambda: Timing(1.0, 1.0, 1.0, 1.0))


def _units(numbers: RopeNumbers) -> dict[str, float]:
    short = numbers.window / numbers.target
    return {SEARCH: 1.0, VALIDATION: 1.0, SHORT_SEARCH: short, SHORT_VALIDATION: short}


def _header(
    model: nn.Module,
    numbers: RopeNumbers,
    config: SearchConfig,
    parts: Parts,
    init: Candidate | None,
    fingerprint: str,
) -> dict[str, Any]:
    import transformers

    weight = next(model.parameters())
    return {
        "model": fingerprint,
        "data": rows_hash(parts),
        "window": numbers.window,
        "target": numbers.target,
        "strategy": config.strategy,
        "seed": config.seed,
        "configuration": config.to_header(),
        "init": None if init is None else init.to_json(),
        "versions": {
            "longrope-export": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "device": _device(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
    }


def _device(device: torch.device) -> str:
    # Other vector units round differently: a search continued on them would not end bit for bit the same.
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _finite_values(values: Mapping[Any, float]) -> dict[str, float | None]:
    return {str(name): value if math.isfinite(value) else None for name, value in values.items()}
