"""The result of a run: JSON, CSV and tables of what the tasks made of the units' answers."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longrope_export.evaluation.protocol import CSV_COLUMNS, Task, Value
from longrope_export.evaluation.rows import ModelRow, model_name
from longrope_export.files import write_text
from longrope_export.versions import versions

if TYPE_CHECKING:
    from rich.table import Table

    from longrope_export.evaluation.run import Plan

FORMAT = "longrope-eval/1"
RESULT, MEASURES = "result.json", "measures.csv"


@dataclass(frozen=True, eq=False)
class EvaluationResult:
    """`values` is the JSON document; `tasks` know how to show their parts of it."""

    values: dict[str, Any]
    tasks: tuple[Task, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form of everything that was measured and of what is needed to measure it again."""
        return self.values

    def tables(self) -> list[Table]:
        """Every task's tables for the terminal."""
        return [table for task in self.tasks for table in task.tables(self.values["tasks"][task.name])]

    def to_csv(self) -> str:
        """One line for every measured number, with a header of `CSV_COLUMNS`."""
        text = io.StringIO()
        writer = csv.DictWriter(text, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._measures())
        return text.getvalue()

    def write(self, folder: Path) -> None:
        """Write `result.json` and `measures.csv`; raises `OutputError`."""
        write_text(folder / MEASURES, self.to_csv(), overwrite=True)
        document = json.dumps(self.values, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(folder / RESULT, document + "\n", overwrite=True)

    def _measures(self) -> Iterator[dict[str, Any]]:
        for task in self.tasks:
            for line in task.measures(self.values["tasks"][task.name]):
                yield {"task": task.name, **line}


def assemble(plan: Plan, values: Mapping[str, Mapping[str, Value]], seconds: float) -> EvaluationResult:
    """The result of a plan whose units are all answered."""
    options, request = plan.options, plan.request
    found = {
        "format": FORMAT,
        "command": options.command,
        "window": request.window,
        "lengths": list(request.lengths),
        "seed": request.seed,
        "dtype": options.dtype,
        "threads": options.threads,
        "runtime": options.runtime,
        "switch": options.switch,
        "context": options.context,
        "position_offset": options.position_offset,
        "prefill_chunk": options.prefill_chunk,
        "models": list(_models(plan)),
        "rows": [_row(row) for row in plan.rows],
        "reference": request.reference,
        "data": _data(plan),
        "options": dict(request.options),
        "tasks": {task.name: task.results(request, plan.rows, values) for task in plan.tasks},
        "notes": notes(plan),
        "seconds": round(seconds, 3),
        "versions": versions(),
    }
    return EvaluationResult(found, plan.tasks)


def _models(plan: Plan) -> Iterator[dict[str, Any]]:
    from longrope_export.fingerprint import fingerprint

    for path, model in zip(plan.options.models, plan.models):
        yield {
            "name": model_name(model),
            "path": str(path),
            "kind": model.kind,
            "fingerprint": fingerprint(path),
            "window": model.original_window,
            "parameters": model.parameters,
        }


def _row(row: ModelRow) -> dict[str, Any]:
    scaling = None if row.scaling is None else row.scaling.to_dict()
    return {"name": row.name, "model": model_name(row.model), "method": row.method, "scaling": scaling}


def _data(plan: Plan) -> dict[str, Any] | None:
    from longrope_export.evaluation.documents import data_hash

    request = plan.request
    if not request.documents and not request.data:
        return None
    return {
        "paths": [str(path) for path in plan.options.data],
        "documents": [{"name": row.name, "tokens": len(row.token_ids)} for row in request.documents],
        "sha256": data_hash(request.documents) if request.documents else None,
    }


def notes(plan: Plan) -> list[str]:
    """What a reader of the numbers should know: rows that are measured beyond the window that they are made for."""
    longest = max(plan.request.lengths) + plan.request.offset
    return [
        f"{row.name} is made for {_made_for(row):,} tokens and was measured at {longest:,}{_silent(plan, row, longest)}"
        for row in plan.rows
        if longest > _made_for(row)
    ]


def _silent(plan: Plan, row: ModelRow, longest: int) -> str:
    if plan.request.runtime != "llamacpp" or longest <= row.model.window:
        return ""
    return f"; llama.cpp's server generates nothing beyond the {row.model.window:,} that the file declares, which counts as wrong"


def _made_for(row: ModelRow) -> int:
    if row.scaling is not None:
        return row.scaling.max_position_embeddings
    return row.model.original_window if row.model.scaling is not None else row.model.window
