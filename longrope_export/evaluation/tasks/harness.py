"""`lm-eval:NAME`: any task of EleutherAI's lm-evaluation-harness on the models and factors of this run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from longrope_export.errors import InputFileError, LongRopeError, MissingDependencyError
from longrope_export.evaluation.protocol import Engine, Request, TaskOption, Unit, Value
from longrope_export.evaluation.rows import ModelRow
from longrope_export.evaluation.tasks.retrieval import option
from longrope_export.files import folder_sha256

if TYPE_CHECKING:
    from rich.table import Table

OPTIONS = (
    TaskOption("lm_eval_include", "Folder with task files (YAML) of your own.", None, str),
    TaskOption("lm_eval_limit", "Questions per harness task [default: all].", None, click.IntRange(min=1)),
    TaskOption(
        "lm_eval_fewshot", "Solved examples before each question [default: the task's].", None, click.IntRange(min=0)
    ),
)


@dataclass(frozen=True)
class Settings:
    """What a harness run is made with, besides the model."""

    name: str
    include: Path | None
    limit: int | None
    fewshot: int | None
    seed: int
    lengths: tuple[int, ...]
    tokenizer: str

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)


@dataclass(frozen=True)
class HarnessTask:
    """One task (or group) of the harness."""

    argument: str
    options: tuple[TaskOption, ...] = OPTIONS

    @property
    def name(self) -> str:
        """As it was asked for."""
        return f"lm-eval:{self.argument}"

    @property
    def summary(self) -> str:
        """One line."""
        return f"lm-evaluation-harness' {self.argument}"

    def document_tokens(self, request: Request) -> int:
        """None: the harness has its own data."""
        return 0

    def units(self, request: Request, row: ModelRow) -> list[Unit]:
        """One unit: the whole task."""
        settings = self._settings(request)
        _check(settings)
        run = partial(_evaluate, row=row, settings=settings, tokenizer=request.tokenizer)
        return [Unit(self._key(settings), settings.max_length, settings.max_length, run)]

    def _settings(self, request: Request) -> Settings:
        folder = option(request, "lm_eval_include", None)
        return Settings(
            name=self.argument,
            include=None if folder is None else Path(folder),
            limit=option(request, "lm_eval_limit", None),
            fewshot=option(request, "lm_eval_fewshot", None),
            seed=request.seed,
            lengths=request.lengths,
            tokenizer=str(getattr(request.tokenizer, "name_or_path", "")),
        )

    def _key(self, settings: Settings) -> str:
        made_with = (settings.limit, settings.fewshot, settings.seed, settings.lengths, _folder_hash(settings.include))
        return f"{self.name} with {importlib.metadata.version('lm_eval')}: {made_with}"

    def results(
        self, request: Request, rows: Sequence[ModelRow], values: Mapping[str, Mapping[str, Value]]
    ) -> dict[str, Any]:
        """By row: the harness' metrics with their standard errors, and the number of questions."""
        settings = self._settings(request)
        return {
            "harness": importlib.metadata.version("lm_eval"),
            "limit": settings.limit,
            "fewshot": settings.fewshot,
            "max_length": settings.max_length,
            "rows": {row.name: values[row.name][self._key(settings)] for row in rows},
        }

    def tables(self, result: Mapping[str, Any]) -> list[Table]:
        """Metrics by row and task."""
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=f"{self.name} ({result['harness']})")
        drawn.add_column("factors")
        for name in ("task", "metric", "value", "standard error", "questions"):
            drawn.add_column(name, justify="right" if name in ("value", "standard error", "questions") else "left")
        for name, row in result["rows"].items():
            for task, found in row["tasks"].items():
                for metric, entry in found["metrics"].items():
                    numbers = (f"{entry['value']:.4f}", _shown(entry["stderr"]), str(found["questions"]))
                    drawn.add_row(Text(name), Text(task), Text(metric), *numbers)
        return [drawn]

    def measures(self, result: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Metrics by row and task; an interval is 1.96 standard errors."""
        for name, row in result["rows"].items():
            for task, found in row["tasks"].items():
                for metric, entry in found["metrics"].items():
                    line = {
                        "row": name,
                        "metric": f"{task} {metric}",
                        "value": entry["value"],
                        "count": found["questions"],
                    }
                    if entry["stderr"] is not None:
                        width = 1.96 * entry["stderr"]
                        line |= {"low": entry["value"] - width, "high": entry["value"] + width}
                    yield line


def task(argument: str) -> HarnessTask:
    """The harness' task called `argument`."""
    return HarnessTask(argument)


def _shown(error: float | None) -> str:
    return "–" if error is None else f"{error:.4f}"


def _check(settings: Settings) -> None:
    """Raise before the weights are read when the harness, the folder or the task is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            "lm-evaluation-harness is needed: pip install 'longrope-export[eval]' (or lm_eval)"
        )
    if settings.include is not None and not settings.include.is_dir():
        raise InputFileError(f"--lm-eval-include: {settings.include} is not a folder")
    if not _manager(settings).match_tasks([settings.name]):
        raise LongRopeError(
            f"lm-evaluation-harness has no task {settings.name!r}: see `lm_eval ls tasks`, or give --lm-eval-include"
        )


def _folder_hash(folder: Path | None) -> str | None:
    """Over the names and bytes of the folder's files: other questions are another unit."""
    if folder is None:
        return None
    return folder_sha256(folder, (path for path in folder.rglob("*") if "__pycache__" not in path.parts))[:16]


@lru_cache(maxsize=4)
def _manager(settings: Settings) -> Any:
    from lm_eval.tasks import TaskManager

    include = None if settings.include is None else str(settings.include)
    # RULER in the harness is generated for the lengths and the tokenizer that stand here.
    metadata = {"max_seq_lengths": list(settings.lengths), "tokenizer": settings.tokenizer}
    if include is not None:
        own = TaskManager(include_path=include, include_defaults=False, metadata=metadata)
        if own.match_tasks([settings.name]):
            return own
    return TaskManager(include_path=include, metadata=metadata)


def _evaluate(engine: Engine, *, row: ModelRow, settings: Settings, tokenizer: Any) -> Value:
    import lm_eval

    from longrope_export.evaluation.harness_model import EngineLM

    model = EngineLM(engine, row, tokenizer, settings.max_length)  # type: ignore[arg-type]
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=[settings.name],
        task_manager=_manager(settings),
        limit=settings.limit,
        num_fewshot=settings.fewshot,
        log_samples=False,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    return {"tasks": {name: _task_entry(found, name) for name in found["results"]}, "truncated": model.truncated}


def _task_entry(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The finite metrics of one task, by the harness' names without their filter where it is "none"."""
    values = found["results"][name]
    metrics = {
        key.removesuffix(",none"): {"value": float(value), "stderr": _number(values.get(_stderr_key(key)))}
        for key, value in values.items()
        if "," in key and "_stderr," not in key and _number(value) is not None
    }
    return {"metrics": metrics, "questions": found.get("n-samples", {}).get(name, {}).get("effective", 0)}


def _stderr_key(key: str) -> str:
    name, _, chosen = key.partition(",")
    return f"{name}_stderr,{chosen}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
