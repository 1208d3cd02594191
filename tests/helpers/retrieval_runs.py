"""Tasks of retrieval run on the embedded demo model, which finds what it is asked for inside its window of 256."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from longrope_export.demo import demo_model_path
from longrope_export.description import describe
from longrope_export.evaluation.documents import Row, load_tokenizer, rows_from_texts
from longrope_export.evaluation.engine import TransformersEngine
from longrope_export.evaluation.protocol import Engine, Request, Task
from longrope_export.evaluation.rows import ModelRow, RowOptions, build_rows
from longrope_export.evaluation.stdlib_corpus import documents
from longrope_export.loader import load


@cache
def demo_tokenizer() -> Any:
    return load_tokenizer(demo_model_path())


@cache
def demo_engine() -> TransformersEngine:
    return TransformersEngine(load(demo_model_path()), demo_tokenizer())


@cache
def demo_rows(*methods: str, longest: int = 256) -> tuple[ModelRow, ...]:
    description = describe(demo_model_path())
    return build_rows([description], RowOptions(methods=methods or ("unchanged",)), longest)


@cache
def demo_documents(length: int, count: int = 2) -> tuple[Row, ...]:
    texts = ((document.name, document.text) for document in documents("report"))
    return tuple(rows_from_texts(texts, demo_tokenizer(), length, count))


def demo_request(*lengths: int, data: Sequence[Path] = (), seed: int = 0, **options: Any) -> Request:
    return Request(
        lengths=lengths, window=256, seed=seed, tokenizer=demo_tokenizer(), documents=demo_documents(max(lengths)),
        data=tuple(data), options=options,
    )  # fmt: skip


def run_task(task: Task, request: Request, engine: Engine | None = None, *methods: str) -> Mapping[str, Any]:
    """The task's result for the demo model, with each method's factors."""
    engine = engine or demo_engine()
    rows = demo_rows(*methods, longest=max(request.lengths))
    values: dict[str, dict[str, Any]] = {}
    for row in rows:
        values[row.name] = {}
        for unit in task.units(request, row):
            if isinstance(engine, TransformersEngine):
                engine.rotate(row, row.factor_set(unit.length, unit.side), unit.length)
            values[row.name][unit.key] = unit.run(engine)
    if isinstance(engine, TransformersEngine):
        engine.restore()
    return task.results(request, rows, values)
