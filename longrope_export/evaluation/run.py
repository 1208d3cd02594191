"""One evaluation run: records and texts first, then each model once, every unit journalled, then the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.description import ModelDescription
from longrope_export.errors import LongRopeError, UnsupportedModelError
from longrope_export.evaluation.journal import EvaluationJournal, journal_path
from longrope_export.evaluation.protocol import ReadsDocuments, Request, Task, Unit
from longrope_export.evaluation.registry import load_tasks
from longrope_export.evaluation.results import EvaluationResult, assemble, notes
from longrope_export.evaluation.rows import UNCHANGED, ModelRow, RowOptions, build_rows
from longrope_export.files import output_errors

if TYPE_CHECKING:
    from longrope_export.evaluation.documents import Row
    from longrope_export.evaluation.engines import RowEngine

# What is measured without --tasks; "retention" joins where there is something to compare with the unmodified model.
DEFAULT_TASKS = ("perplexity", "passkey")
RETENTION = "retention"
TRANSFORMERS, LLAMACPP = "transformers", "llamacpp"
MOST_DOCUMENTS = 5
# Of each text that tells tokenizers apart where the tasks read no documents.
PROBE_TOKENS = 512

Progress = Callable[[int, int], None]
Reporter = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What `longrope eval` was asked for; `methods` are names of `METHODS`, "unchanged", "plain" or record files.

    `lengths` are tokens; none means the window L and the longest window of the rows. No `tasks`: the usual ones.
    `prefill_chunk` as in `TransformersEngine`. `task_options` holds what was given of the tasks' own options.
    """

    models: tuple[Path, ...]
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    data: tuple[Path, ...] = ()
    documents: int | None = None
    scalings: tuple[Path, ...] = ()
    methods: tuple[str, ...] = (UNCHANGED,)
    switch: str = "sequence"
    context: int | None = None
    target: int | None = None
    runtime: str = TRANSFORMERS
    dtype: str | None = None
    prefill_chunk: int | None = None
    position_offset: int = 0
    seed: int = 0
    threads: int | None = None
    out: Path | None = None
    command: str | None = None
    task_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is known before a model is loaded; `units` by row name."""

    options: EvaluateOptions
    models: tuple[ModelDescription, ...]
    rows: tuple[ModelRow, ...]
    tasks: tuple[Task, ...]
    request: Request
    units: Mapping[str, Mapping[str, Unit]]


def run_evaluation(
    options: EvaluateOptions,
    models: Sequence[ModelDescription],
    report: Reporter = lambda title: nullcontext(),
    say: Callable[[str], None] = lambda line: None,
) -> EvaluationResult:
    """Check records and texts, run what the journal does not hold yet, and write and return the results.

    `models` describe `options.models`; `report(title)` gives a progress callback, `say` takes what is to be known before
    it is waited for. With `options.out` every unit is on
    the disk when it is done: the same call goes on after an interruption, one with other options raises
    `StaleStateError`. Raises a `LongRopeError` before a model is loaded when a record, a text or a length does not fit.
    """
    started = time.perf_counter()
    plan = make_plan(options, models)
    for line in notes(plan):
        say(f"note: {line}")
    with _journal(plan) as journal:
        if known := sum(key in journal.row(name) for name, units in plan.units.items() for key in units):
            say(f"{options.out}: going on, {known} of {sum(map(len, plan.units.values()))} parts are there")
        _measure(plan, journal, report)
        result = assemble(plan, journal.values, time.perf_counter() - started)
        if options.out:
            result.write(options.out)
    return result


def make_plan(options: EvaluateOptions, models: Sequence[ModelDescription]) -> Plan:
    """Rows, texts and units of a run; raises a `LongRopeError` for what does not fit."""
    window = models[0].original_window
    lengths = options.lengths or _default_lengths(options, models)
    rows = build_rows(models, row_options(options), max(lengths) + options.position_offset)
    _check_runtime(options, rows)
    reference = next((row.name for row in rows if row.is_reference), None)
    tasks = load_tasks(options.tasks or _default_tasks(rows, reference))
    request = Request(
        lengths=tuple(sorted(set(lengths))),
        window=window,
        seed=options.seed,
        tokenizer=None,
        rows=tuple(row.name for row in rows),
        reference=reference,
        runtime=options.runtime,
        offset=options.position_offset,
        options=_task_options(tasks, options.task_options),
    )
    request = _with_texts(request, tasks, options)
    units = {row.name: {unit.key: unit for task in tasks for unit in task.units(request, row)} for row in rows}
    return Plan(options, tuple(models), rows, tasks, request, units)


def row_options(options: EvaluateOptions) -> RowOptions:
    """The part of the options that decides the rows."""
    return RowOptions(
        methods=options.methods,
        scalings=options.scalings,
        target=options.target,
        switch=options.switch,
        context=options.context,
    )


def _default_lengths(options: EvaluateOptions, models: Sequence[ModelDescription]) -> tuple[int, ...]:
    windows = [options.target or 0, *(model.window for model in models)]
    for row in build_rows(models, row_options(options), max(windows)):
        windows.append(0 if row.scaling is None else row.scaling.max_position_embeddings)
    return tuple(sorted({models[0].original_window, max(windows)}))


def _default_tasks(rows: Sequence[ModelRow], reference: str | None) -> tuple[str, ...]:
    return (*DEFAULT_TASKS[:1], *([RETENTION] if reference and len(rows) > 1 else []), *DEFAULT_TASKS[1:])


def _task_options(tasks: Sequence[Task], given: Mapping[str, Any]) -> dict[str, Any]:
    known = {option.name: option.default for task in tasks for option in task.options}
    for name in given:
        if name not in known:
            raise LongRopeError(
                f"--{name.replace('_', '-')} belongs to none of the tasks {', '.join(task.name for task in tasks)}; "
                "name its task in --tasks or leave it out"
            )
    return {**known, **given}


def _check_runtime(options: EvaluateOptions, rows: Sequence[ModelRow]) -> None:
    if options.runtime != LLAMACPP:
        return
    if others := [row.name for row in rows if row.method != UNCHANGED]:
        raise UnsupportedModelError(
            f"llama.cpp applies what a file carries and nothing else ({', '.join(others)}): "
            "write the factors into a copy with `longrope patch` and name both files"
        )
    for row in rows:
        if row.model.kind != "gguf":
            raise UnsupportedModelError(f"{row.model.path} is no GGUF file; --runtime llamacpp runs GGUF files only")
    wanted = {
        "dtype": options.dtype,
        "prefill-chunk": options.prefill_chunk,
        "position-offset": options.position_offset,
    }
    wanted |= {"switch": options.switch if options.switch in ("short", "long") else None}
    if named := [f"--{name}" for name, value in wanted.items() if value]:
        raise LongRopeError(f"{', '.join(named)}: not with --runtime llamacpp, which decides that by itself")


def _with_texts(request: Request, tasks: Sequence[Task], options: EvaluateOptions) -> Request:
    from longrope_export.evaluation.documents import distinct_files, load_tokenizer

    # Paths are looked at first: the tokenizer of a big GGUF takes seconds to read.
    request = replace(request, data=tuple(distinct_files(options.data)))
    request = replace(request, tokenizer=load_tokenizer(options.models[0]))
    wanted = [entry for task in tasks if isinstance(task, ReadsDocuments) for entry in task.wanted(request)]
    request = replace(request, wanted=tuple(dict.fromkeys(wanted)))
    if request.offset and (others := [task.name for task in tasks if task.name != "perplexity"]):
        raise LongRopeError(f"--position-offset is for the task perplexity; leave out {', '.join(others)}")
    tokens = max(task.document_tokens(request) for task in tasks)
    if tokens:
        request = replace(request, documents=tuple(_documents(request, tokens, options.documents)))
    if len(options.models) > 1:
        _check_same_tokens(request, options, tokens)
    return request


def _documents(request: Request, tokens: int, documents: int | None) -> list[Row]:
    from longrope_export.evaluation.documents import rows_from_texts

    if request.data:
        return rows_from_texts(request.texts(), request.tokenizer, tokens, documents, at_most=MOST_DOCUMENTS)
    return standard_library_rows(request.tokenizer, tokens, documents)


def _check_same_tokens(request: Request, options: EvaluateOptions, tokens: int) -> None:
    """Raise `UnsupportedModelError` for a model with another tokenizer: all get the first one's token ids.

    Without documents the standard library's first tokens tell.
    """
    from longrope_export.evaluation.documents import data_hash, load_tokenizer

    def read(by: Request) -> str:
        if tokens:
            return data_hash(_documents(by, tokens, options.documents))
        return data_hash(standard_library_rows(by.tokenizer, PROBE_TOKENS))

    first = data_hash(request.documents) if tokens else read(request)
    for path in options.models[1:]:
        if read(replace(request, tokenizer=load_tokenizer(path))) != first:
            raise UnsupportedModelError(
                f"{path} splits the texts into other tokens than {options.models[0]}: what is measured a token cannot be "
                "compared; evaluate it in a run of its own"
            )


def standard_library_rows(tokenizer: Any, length: int, documents: int | None = None) -> list[Row]:
    """Rows from the report texts of Python's own standard library: what there is to measure on without any file."""
    from longrope_export.evaluation import stdlib_corpus
    from longrope_export.evaluation.documents import rows_from_texts

    texts = ((document.name, document.text) for document in stdlib_corpus.documents("report"))
    return rows_from_texts(texts, tokenizer, length, documents, at_most=MOST_DOCUMENTS)


def _journal(plan: Plan) -> EvaluationJournal:
    from longrope_export.evaluation.identity import evaluation_header

    out = plan.options.out
    if out is None:
        return EvaluationJournal(None, {})
    with output_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    return EvaluationJournal(journal_path(out), evaluation_header(plan))


def _measure(plan: Plan, journal: EvaluationJournal, report: Reporter) -> None:
    missing = {
        row.name: [unit for key, unit in plan.units[row.name].items() if key not in journal.row(row.name)]
        for row in plan.rows
    }
    if not any(missing.values()):
        return
    everything, done = sum(unit.cost for units in missing.values() for unit in units), 0
    with report("evaluation") as progress:
        for row, engine in _engines(plan, missing):
            for unit in missing[row.name]:
                began = time.perf_counter()
                engine.rotate(row, row.factor_set(unit.length, unit.side), unit.length)
                try:
                    value = unit.run(engine)
                except LongRopeError as error:
                    raise type(error)(f"{row.name}: {error}") from error
                journal.append(row.name, unit.key, value, time.perf_counter() - began)
                done += unit.cost
                if progress:
                    progress(done, everything)


def _engines(plan: Plan, missing: Mapping[str, Sequence[Unit]]) -> Iterator[tuple[ModelRow, RowEngine]]:
    """Each row that has something to do, with the engine of its model; one model is in memory at a time."""
    from longrope_export.evaluation.engines import open_engine

    for model, path in zip(plan.models, plan.options.models):
        rows = [row for row in plan.rows if row.model is model and missing[row.name]]
        if not rows:
            continue
        engine = open_engine(path, model, plan.options, plan.request.tokenizer)
        try:
            yield from ((row, engine) for row in rows)
        finally:
            engine.close()
