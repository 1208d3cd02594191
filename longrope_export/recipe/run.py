"""`run_recipe`: every stage in order, each in a folder that is used again when it is finished, then the model and its proof."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from longrope_export.denormals import flushed_denormals
from longrope_export.description import describe
from longrope_export.files import folder_sha256, sha256, write_text
from longrope_export.fingerprint import fingerprint
from longrope_export.recipe.commands import TUNED, parsed, record_of, shell_line
from longrope_export.recipe.measure import UNCHANGED, Measurer, closed_forms
from longrope_export.recipe.output import write_output
from longrope_export.recipe.plan import Job, Step, plan_recipe, recipe_texts
from longrope_export.recipe.preflight import check_lengths
from longrope_export.recipe.progress import finish_stage, finished_stage
from longrope_export.recipe.schema import Role
from longrope_export.rope.methods import METHODS
from longrope_export.scaling import RopeScaling

Say = Callable[[str], None]


@flushed_denormals()  # before torch's threads begin
def run_recipe(job: Job, say: Say) -> dict[str, Any]:
    """Follow the recipe and return its report, JSON-ready; what is finished already is not done again.

    `job.out` ends with one folder for each stage, the extended model in `model/`, `report.json`, and in `measures/` what
    every record was measured at.
    """
    steps = plan_recipe(job)
    job.out.mkdir(parents=True, exist_ok=True)
    write_text(job.out / "recipe.json", json.dumps({"recipe": job.recipe.name}) + "\n", overwrite=True)
    check_lengths(steps, job.model)
    window, texts = describe(job.model).window, recipe_texts(job)
    report_texts = [Path(text) for text in texts.get("report", ())]
    sums = {role: [_sum(Path(path)) for path in paths] for role, paths in texts.items()}
    kept = job.out / "measures"
    kept.mkdir(exist_ok=True)
    measurer = Measurer(job.recipe.report, report_texts, window, job.chosen_seed, kept, sums.get("report", ()))
    runner = _Runner(job, measurer, sums, say)
    results = [runner.before(steps[0])] if report_texts else []
    results += [runner.run(number, step) for number, step in enumerate(steps, 1)]
    return runner.finish(steps, results)


class _Runner:
    """Runs, measures and keeps each stage."""

    def __init__(self, job: Job, measurer: Measurer, sums: Mapping[Role, Sequence[str]], say: Say) -> None:
        self._job, self._measurer, self._sums, self._say = job, measurer, sums, say

    def before(self, first: Step) -> dict[str, Any]:
        """What the given model does as it is, and under the closed forms for the first stage's length."""
        folder = self._job.out / "0-before"
        identity = {"model": fingerprint(self._job.model), **self._identity("report")}
        left = finished_stage(folder, identity)
        if left is None:
            self._say("measuring the model as it was given")
            folder.mkdir(parents=True, exist_ok=True)
            left = self._measured(self._job.model, first.target, {UNCHANGED: None})
            finish_stage(folder, identity, left)
        return {"stage": "before", **left}

    def run(self, number: int, step: Step) -> dict[str, Any]:
        """One stage's result: what it was, how long it took, and what was measured after it."""
        stage, job = step.stage, self._job
        title = f"stage {number} of {len(job.recipe.stages)}, {stage.name}"
        _write_closed_form(step)
        identity = {
            "stage": json.loads(json.dumps(asdict(stage))),
            "seed": job.chosen_seed,
            "model": fingerprint(step.model),
            "factors": None if step.factors is None else _bits(step.factors),
            **self._identity("train" if stage.kind == "finetune" else "search", "report"),
        }
        left = finished_stage(step.folder, identity)
        if left is not None:
            self._say(f"{title}: finished before")
            return left
        self._say(f"{title}: {shell_line(step.words)}")
        started = time.perf_counter()
        _execute(step, self._say)
        seconds = round(time.perf_counter() - started, 1)
        result = {
            "stage": stage.name, "kind": stage.kind, "window": step.window, "target": step.target,
            "command": shell_line(step.words), "seconds": seconds, **self._after(step),
        }  # fmt: skip
        finish_stage(step.folder, identity, result)
        return result

    def finish(self, steps: Sequence[Step], results: list[dict[str, Any]]) -> dict[str, Any]:
        """The extended model in `model/`, its proof, and report.json."""
        job, last = self._job, steps[-1]
        record = RopeScaling.from_json(record_of(last.stage, last.folder).read_text("utf-8"))
        model = last.folder / TUNED if last.stage.kind == "finetune" else last.model
        report = {"recipe": job.recipe.name, "about": job.recipe.about, "seed": job.chosen_seed, "stages": results}
        report |= {"scaling": record.to_dict(), **write_output(job, model, record, results, self._say)}
        write_text(job.out / "report.json", json.dumps(report, indent=2) + "\n", overwrite=True)
        return report

    def _after(self, step: Step) -> dict[str, Any]:
        if not self._measurer.plan.lengths:
            return {}
        self._say(f"measuring after {step.stage.name}")
        record = RopeScaling.from_json(record_of(step.stage, step.folder).read_text("utf-8"))
        if step.stage.kind == "finetune":
            # Factors of a closed form on weights that were tuned with others would say nothing.
            return self._measurer.measure(step.folder / TUNED, step.target, {step.stage.name: record})
        return self._measured(step.model, step.target, {step.stage.name: record})

    def _measured(self, model: Path, target: int, scalings: Mapping[str, RopeScaling | None]) -> dict[str, Any]:
        forms = closed_forms(model, target, self._measurer.plan.baselines)
        return self._measurer.measure(model, target, {**forms, **scalings})

    def _identity(self, *roles: Role) -> dict[str, Any]:
        """What is measured, and the texts of these roles by their bytes: paths may change, what is in them may not."""
        texts = {f"{role} texts": self._sums[role] for role in roles if role in self._sums}
        return {"report": json.loads(json.dumps(asdict(self._measurer.plan))), **texts}


def _execute(step: Step, say: Say) -> None:
    options = parsed(step.words, step.stage.name)
    if step.stage.kind == "finetune":
        from longrope_export.cli.finetune import finetune_config
        from longrope_export.cli.progress import progress as bar
        from longrope_export.training.finetune import run

        with bar("fine-tuning") as report:
            run(finetune_config(options), report, say)
        return
    from longrope_export.cli.search import search_config
    from longrope_export.search.progress import SearchProgress
    from longrope_export.search.run import run_search

    with SearchProgress() as progress:
        run_search(replace(search_config(options), command=shell_line(step.words)), progress)


def _write_closed_form(step: Step) -> None:
    if step.stage.factors not in METHODS or step.factors is None:
        return
    record = closed_forms(step.model, step.target, [step.stage.factors])[step.stage.factors]
    step.folder.mkdir(parents=True, exist_ok=True)
    write_text(step.factors, record.to_json(), overwrite=True)


def _sum(path: Path) -> str:
    return folder_sha256(path) if path.is_dir() else sha256(path)


def _bits(path: Path) -> list[Any]:
    """What a record applies, without how it was found."""
    record = RopeScaling.from_json(path.read_text("utf-8"))
    return [value for name, value in record.to_dict().items() if name != "provenance"]
