"""One evaluation run: data first, then the model, then the tasks, and a result that says how it was made."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.description import ModelDescription
from longrope_export.errors import ScalingError
from longrope_export.rope.methods import METHODS
from longrope_export.scaling import RopeScaling
from longrope_export.versions import versions

if TYPE_CHECKING:
    from longrope_export.evaluation.documents import Row
    from longrope_export.evaluation.passkey import PasskeyResult
    from longrope_export.evaluation.perplexity import PerplexityResult
    from longrope_export.evaluation.tables import ComparisonTable

TASKS = ("perplexity", "passkey")
UNCHANGED = "unchanged"
MOST_DOCUMENTS = 5

Progress = Callable[[int, int], None]
Reporter = Callable[[str], AbstractContextManager[Progress | None]]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """What `longrope eval` was asked for; `methods` are names, record files or "unchanged".

    `lengths` are tokens; none means the window L and the longer window of the record or of `target`.
    """

    model: Path
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    data: tuple[Path, ...] = ()
    documents: int | None = None
    scaling: Path | None = None
    switch: str = "sequence"
    context: int | None = None
    methods: tuple[str, ...] = ()
    target: int | None = None
    dtype: str | None = None
    trials: int = 10
    passkey_mode: str = "both"
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """Results of the tasks that were asked for: one model's, or a comparison of several scalings."""

    options: EvaluateOptions
    description: ModelDescription
    scaling: RopeScaling | None
    rows: tuple[Row, ...]
    perplexity: PerplexityResult | None
    comparison: ComparisonTable | None
    passkey: dict[str, PasskeyResult]
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form of everything that was measured and of what is needed to measure it again."""
        from longrope_export.evaluation.documents import data_hash

        options = self.options
        passkey = {name: result.to_dict() for name, result in self.passkey.items()}
        return {
            "model": str(options.model),
            "window": self.description.original_window,
            "lengths": list(options.lengths),
            "switch": None if options.methods else options.switch,
            "context": options.context,
            "scaling": None if self.scaling is None else self.scaling.to_dict(),
            "data": [str(path) for path in options.data],
            "documents": [row.name for row in self.rows],
            "data_sha256": data_hash(self.rows) if self.rows else None,
            "dtype": options.dtype,
            "threads": options.threads,
            "seed": options.seed,
            "perplexity": None if self.perplexity is None else self.perplexity.to_dict(),
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "passkey": passkey if options.methods else passkey.get(""),
            "seconds": round(self.seconds, 3),
            "versions": self.versions,
        }


def run_evaluation(
    options: EvaluateOptions, description: ModelDescription, report: Reporter = lambda title: nullcontext()
) -> EvaluationResult:
    """Check records and data, load the model, run the tasks; `report(title)` gives a progress callback.

    Raises a `LongRopeError` before the model is loaded when a record, a text or a length does not fit.
    """
    started = time.perf_counter()
    scaling, scalings = _records(options, description)
    options = replace(options, lengths=_lengths(options, description, scaling))
    rows, tokenizer = _data(options)
    model = _load(options, scaling)
    perplexity, comparison = _perplexity(options, model, rows, scalings, description, report)
    return EvaluationResult(
        options=options,
        description=description,
        scaling=scaling,
        rows=tuple(rows),
        perplexity=perplexity,
        comparison=comparison,
        passkey=_passkey(options, model, tokenizer, scalings, report),
        seconds=time.perf_counter() - started,
        versions=versions(),
    )


def _records(
    options: EvaluateOptions, description: ModelDescription
) -> tuple[RopeScaling | None, dict[str, RopeScaling | None]]:
    from longrope_export.formats.records import read_scaling

    scaling = description.scaling if options.scaling is None else read_scaling(options.scaling)
    if scaling is None and options.switch != "sequence":
        raise ScalingError(f"--switch {options.switch} chooses a record's set, and there is none; give --scaling")
    target = options.target or max(options.lengths, default=description.window)
    scalings = dict(_method_record(name, description, target) for name in options.methods)
    if len(scalings) != len(options.methods):
        raise ScalingError("--methods names one row twice; give each method or file once")
    for record in (scaling, *scalings.values()):
        if record is not None:
            record.check_model(description.rotary_dim, description.rope_theta)
    return scaling, scalings


def _lengths(options: EvaluateOptions, description: ModelDescription, scaling: RopeScaling | None) -> tuple[int, ...]:
    if options.lengths:
        return options.lengths
    longer = options.target or (description.window if scaling is None else scaling.max_position_embeddings)
    return tuple(sorted({description.original_window, longer}))


def _method_record(name: str, description: ModelDescription, target: int) -> tuple[str, RopeScaling | None]:
    from longrope_export.formats.records import read_scaling
    from longrope_export.pipeline import closed_form_scaling

    if name == UNCHANGED:
        return name, None
    if name not in METHODS and Path(name).exists():
        return Path(name).stem, read_scaling(name)
    return name, closed_form_scaling(description, target, name)


def _data(options: EvaluateOptions) -> tuple[list[Row], Any]:
    from longrope_export.evaluation.documents import evaluation_rows, find_text_files, load_tokenizer
    from longrope_export.evaluation.passkey import passkey_prompts

    # Paths are looked at first: the tokenizer of a big GGUF takes seconds to read.
    files = find_text_files(options.data)
    tokenizer = load_tokenizer(options.model)
    rows: list[Row] = []
    if "perplexity" in options.tasks:
        longest = max(options.lengths)
        if files:
            rows = evaluation_rows(files, tokenizer, longest, options.documents, at_most=MOST_DOCUMENTS)
        else:
            rows = standard_library_rows(tokenizer, longest, options.documents)
    if "passkey" in options.tasks:
        passkey_prompts(tokenizer, min(options.lengths), options.trials, options.seed)
    return rows, tokenizer


def standard_library_rows(tokenizer: Any, length: int, documents: int | None = None) -> list[Row]:
    """Rows from the report texts of Python's own standard library: what there is to measure on without any file."""
    from longrope_export.evaluation import stdlib_corpus
    from longrope_export.evaluation.documents import rows_from_texts

    texts = ((document.name, document.text) for document in stdlib_corpus.documents("report"))
    return rows_from_texts(texts, tokenizer, length, documents, at_most=MOST_DOCUMENTS)


def _load(options: EvaluateOptions, scaling: RopeScaling | None) -> Any:
    import torch

    from longrope_export.loader import load

    if options.threads:
        torch.set_num_threads(options.threads)
    keywords: dict[str, Any] = {} if options.dtype is None else {"dtype": getattr(torch, options.dtype)}
    if options.methods:
        return load(options.model, **keywords)
    return load(options.model, scaling, switch=options.switch, context=options.context, **keywords)  # type: ignore[arg-type]


def _perplexity(
    options: EvaluateOptions,
    model: Any,
    rows: Sequence[Row],
    scalings: dict[str, RopeScaling | None],
    description: ModelDescription,
    report: Reporter,
) -> tuple[PerplexityResult | None, ComparisonTable | None]:
    from longrope_export.evaluation.perplexity import evaluate_perplexity
    from longrope_export.evaluation.tables import compare_methods

    if "perplexity" not in options.tasks:
        return None, None
    with report("perplexity") as progress:
        if not scalings:
            return evaluate_perplexity(model, rows, options.lengths, progress=progress), None
        window = min(description.original_window, max(options.lengths))
        return None, compare_methods(model, rows, options.lengths, scalings, window=window, progress=progress)


def _passkey(
    options: EvaluateOptions,
    model: Any,
    tokenizer: Any,
    scalings: dict[str, RopeScaling | None],
    report: Reporter,
) -> dict[str, PasskeyResult]:
    from longrope_export.evaluation.passes import fixed_set
    from longrope_export.evaluation.passkey import evaluate_passkey

    if "passkey" not in options.tasks:
        return {}
    results: dict[str, PasskeyResult] = {}
    for name, scaling in (scalings or {"": None}).items():
        with (
            nullcontext() if scaling is None else fixed_set(model, scaling, "long"),
            report(f"passkey {name}".strip()) as progress,
        ):
            results[name] = evaluate_passkey(
                model,
                tokenizer,
                options.lengths,
                options.trials,
                options.seed,
                options.passkey_mode,  # type: ignore[arg-type]
                progress=progress,
            )
    return results
