"""The search of a model in memory: journal, plan, the long set, n̂, the sets for shorter ones, and the record of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from longrope_export.errors import LongRopeError, ScalingError
from longrope_export.evaluation.documents import row_digest
from longrope_export.fingerprint import fingerprint_model
from longrope_export.lengths import resolve_length
from longrope_export.search.config import MOST_DOCUMENTS, SearchConfig, parse_budget
from longrope_export.search.documents import EARLY, REPORT, SHORT_PIECES, Parts, split_rows, with_plain_losses
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors import InProcess
from longrope_export.search.identity import search_header, torch_engine
from longrope_export.search.initial import read_init
from longrope_export.search.journal import COMMAND, PLAN, Journal
from longrope_export.search.objective import ModelObjective
from longrope_export.search.plan import Plan, Sizes, Timing, make_plan
from longrope_export.search.probe import probe
from longrope_export.search.protocol import (
    SEARCH,
    SHORT_SEARCH,
    SHORT_VALIDATION,
    VALIDATION,
    Executor,
    Outcome,
    TimedObjective,
    Trial,
)
from longrope_export.search.result import SearchResult
from longrope_export.search.space import Candidate, RopeNumbers
from longrope_export.search.stages import Stages

__all__ = ["Progress", "SearchResult", "check_budget", "read_init", "search_factors"]


class Progress(Protocol):
    """Is told what a search does."""

    def plan(self, plan: Plan, sizes: Mapping[str, int], units: Mapping[str, float]) -> None:
        """The plan, the number of documents of each part, and what measuring one of each part counts."""
        ...

    def observe(self, trial: Trial, outcome: Outcome, measured_now: bool) -> None:
        """One outcome, measured now or known from the journal."""
        ...


class SearchStopped(KeyboardInterrupt):
    """Ctrl-C; `best` is the best so far, or None when nothing was compared yet."""

    def __init__(self, best: SearchResult | None) -> None:
        super().__init__("the search was stopped")
        self.best = best


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
    tokenizer: Any = None,
    workers: Callable[[Parts], AbstractContextManager[Executor]] | None = None,
) -> SearchResult:
    """Search factors for a model in memory.

    `rows` are token ids, each at least L' long: the first `config.documents` are searched on (0: as
    many as are left over, within bounds), the next
    `config.validation_documents` choose, the next `config.report_documents` do neither. `kind` ("hf" or "gguf") says
    what `config.runtime` "auto" means. With `journal_path`, a search that was stopped there is continued. The objective
    "needle" needs the model's `tokenizer`; `workers` opens another executor than this process.
    The model gets its own rotary embedding back.

    Raises `TextTooShortError`, `StaleStateError` when the journal is of another search, `UnsupportedModelError`,
    `LongRopeError` for options that do not fit the runtime or a budget that is too small, and `SearchStopped` on Ctrl-C.
    """
    resolved = config.with_texts(len(rows), tokenizer, numbers.target).resolve(numbers, kind)
    check_budget(resolved, numbers)
    init = read_init(resolved, numbers)
    parts = search_parts(rows, numbers, resolved, getattr(model.config, "bos_token_id", None), tokenizer)
    objective = ModelObjective(model, numbers, parts)
    try:
        engine = torch_engine(model)
        header = search_header(engine, numbers, resolved, parts, init, fingerprint or fingerprint_model(model))
        run = Run(
            objective,
            lambda: workers(parts) if workers else nullcontext(InProcess(objective)),
            header,
            init,
            objective.rows,
        )
        return search_measured(run, numbers, resolved, parts, journal_path, progress)
    finally:
        objective.close()


@dataclass(frozen=True)
class Run:
    """What measures in a search: the objective that is timed, what opens the executor, the journal's header, the start.

    `rows` is the evaluator's.
    """

    objective: TimedObjective
    executor: Callable[[], AbstractContextManager[Executor]]
    header: Mapping[str, Any]
    init: Candidate | None
    rows: Mapping[str, int] = field(default_factory=dict)


def search_measured(
    run: Run,
    numbers: RopeNumbers,
    config: SearchConfig,
    parts: Parts,
    journal_path: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Search with a resolved `config` and whatever measures; raises as `search_factors`."""

    def search(journal: Journal | None, plan: Plan) -> SearchResult:
        sizes = {part: len(documents) for part, documents in parts.items()}
        if progress:
            progress.plan(plan, sizes, part_units(config, numbers, parts))
        with run.executor() as executor:
            evaluator = Evaluator(executor, sizes, journal, progress.observe if progress else None, run.rows)
            stages = Stages(evaluator, numbers, config, plan, run.header, part_units(config, numbers, parts), run.init)
            try:
                return stages.run()
            except KeyboardInterrupt:
                raise SearchStopped(stages.best_so_far()) from None

    if journal_path is None:
        return search(None, new_plan(run.objective, numbers, config, parts))
    with Journal(Path(journal_path)) as journal:
        if journal.header is None:
            plan = new_plan(run.objective, numbers, config, parts)
            journal.begin({**run.header, COMMAND: config.command, PLAN: plan.to_json()})
        else:
            journal.check(run.header)
            plan = Plan(**journal.header[PLAN])
        return search(journal, plan)


def search_parts(
    rows: Sequence[npt.ArrayLike], numbers: RopeNumbers, config: SearchConfig, bos: int | None, tokenizer: Any = None
) -> Parts:
    """The documents of every part of a search.

    Raises `TextTooShortError`, and `LongRopeError` as `Mixture.documents` or for a row that two parts would share.
    """
    plain = split_rows(
        rows, documents=config.documents, validation=config.validation_documents, report=config.report_documents,
        window=numbers.short_window, target=numbers.target, bos=bos, lengths=set_lengths(config, numbers),
        early_length=early_length(config, numbers),
    )  # fmt: skip
    _check_disjoint(plain)
    parts = with_plain_losses(plain)
    if config.mixture.is_perplexity:
        return parts
    short_parts = {SEARCH: SHORT_SEARCH, VALIDATION: SHORT_VALIDATION}
    for number, part in enumerate((SEARCH, VALIDATION)):
        pieces = plain[short_parts[part]]
        first = pieces[:: len(pieces) // len(plain[part])]
        parts[part] = config.mixture.documents(plain[part], first, tokenizer, (config.seed, 2, number))
    for part in (part for part in plain if part.startswith(EARLY)):
        first = tuple(row[: numbers.short_window] for row in plain[part])
        parts[part] = config.mixture.documents(plain[part], first, tokenizer, (config.seed, 2, 2))
    return parts


def _check_disjoint(plain: Mapping[str, Sequence[npt.NDArray[np.int64]]]) -> None:
    seen: dict[bytes, str] = {}
    for part in (SEARCH, VALIDATION, REPORT):
        named = {row_digest(row): f"{part} document {number}" for number, row in enumerate(plain[part], 1)}
        for digest, name in named.items():
            if digest in seen:
                raise LongRopeError(
                    f"{name} is the same as {seen[digest]}: what is searched on, what chooses and what is reported on "
                    "must be different texts"
                )
        seen |= named


def set_lengths(config: SearchConfig, numbers: RopeNumbers) -> tuple[int, ...]:
    """The lengths of `config.sets` in tokens, rising; raises `ScalingError` for one that is not between L and L'."""
    lengths = sorted({resolve_length(text, numbers.window) for text in config.sets})
    for length in lengths:
        if not numbers.short_window < length < numbers.target:
            raise ScalingError(
                f"--sets has {length:,} tokens; each must be between {numbers.short_window:,} and {numbers.target:,}"
            )
    return tuple(lengths)


def early_length(config: SearchConfig, numbers: RopeNumbers) -> int | None:
    """`config.early_length` in tokens, or None; raises `ScalingError` unless it is between L and L'."""
    if config.early_length is None:
        return None
    length = resolve_length(config.early_length, numbers.window)
    if not numbers.window < length < numbers.target:
        raise ScalingError(
            f"--early-length has {length:,} tokens; it must be between {numbers.window:,} and {numbers.target:,}"
        )
    return length


def new_plan(
    objective: TimedObjective, numbers: RopeNumbers, config: SearchConfig, parts: Parts, timing: Timing | None = None
) -> Plan:
    """The plan of a search that begins; passes are timed, unless they were, where the budget is a time."""
    sizes = _sizes(config, numbers, {part: len(documents) for part, documents in parts.items()})

    def measured() -> Timing:
        found = timing or probe(objective, numbers, config.method == "gradient", early_length(config, numbers))
        return shared_timing(config, found)

    return make_plan(config, sizes, measured)


def at_once(config: SearchConfig) -> int:
    """Passes that are made at the same time: a population keeps every worker busy, a descent asks for a few at a time."""
    return 1 if config.executor == "local" or config.method == "gradient" else config.worker_count


def shared_timing(config: SearchConfig, timing: Timing) -> Timing:
    """What a pass takes of a search's time, from the `timing` of one pass alone."""
    return Timing(*(seconds / at_once(config) for seconds in astuple(timing)))


def _sizes(config: SearchConfig, numbers: RopeNumbers, documents: Mapping[str, int]) -> Sizes:
    values = len(config.start_tokens or (0,))
    free = numbers.pairs - min(config.critical_indices or (0,))
    return Sizes(
        documents=documents[SEARCH],
        validation=documents[VALIDATION],
        short_documents=documents[SHORT_SEARCH],
        short_validation=documents[SHORT_VALIDATION],
        baselines=len(config.baselines),
        starts=values if values > 1 else 0,
        short_ratio=numbers.short_window / numbers.target,
        unit=config.mixture.passes(numbers.short_scale),
        sets=tuple(length / numbers.target for length in set_lengths(config, numbers)),
        arms=len(config.critical_indices or (0,)),
        population=config.cmaes.candidates(max(free, 1), bool(config.learn_attention)),
        early_ratio=(early_length(config, numbers) or 0) / numbers.target,
    )


def check_budget(config: SearchConfig, numbers: RopeNumbers) -> None:
    """Raise `LongRopeError` when a resolved configuration's number of evaluations does not pay for one step."""
    set_lengths(config, numbers)
    early_length(config, numbers)
    if parse_budget(config.budget).evaluations is None:
        return
    pieces = min(SHORT_PIECES, numbers.target // numbers.short_window)
    documents = config.documents or MOST_DOCUMENTS[config.method]
    counts = {SEARCH: documents, VALIDATION: config.validation_documents}
    counts |= {SHORT_SEARCH: documents * pieces, SHORT_VALIDATION: config.validation_documents * pieces}
    make_plan(config, _sizes(config, numbers, counts), lambda: Timing(1.0, 1.0, 1.0, 1.0))


def part_units(config: SearchConfig, numbers: RopeNumbers, parts: Mapping[str, Any]) -> dict[str, float]:
    """What one forward pass on a document of each part counts, in search documents measured."""
    unit = config.mixture.passes(numbers.short_scale)
    units = {SEARCH: 1.0, VALIDATION: 1.0, REPORT: 1.0 / unit}
    for part in parts:
        length = int(part.partition("@")[2] or numbers.short_window)
        units.setdefault(part, length / numbers.target / unit)
    return units
