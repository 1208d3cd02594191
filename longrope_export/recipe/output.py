"""The end of a recipe: the extended model with its card, its proof, and the table of everything that was measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longrope_export import pipeline
from longrope_export.description import ModelDescription, describe
from longrope_export.errors import UnsupportedModelError
from longrope_export.recipe.plan import Job
from longrope_export.scaling import RopeScaling

Say = Callable[[str], None]


def write_output(
    job: Job, model: Path, record: RopeScaling, results: Sequence[Mapping[str, Any]], say: Say
) -> dict[str, Any]:
    """Write `job.out`/model, unless it is there, and prove it; what it is, what it lost, remarks and the verdict.

    Without the tokenizer or architecture for a GGUF there is none. Nothing is proved where something was lost.
    """
    description = describe(model)
    plan = _output(description, record, job.out / "model", job.allow_lossy)
    notes = _notes(job.out)
    if not plan.target.exists():
        say(f"writing {plan.target}")
        try:
            _write(description, record, plan, job, results)
        except UnsupportedModelError as error:
            if plan.gguf_name is None:
                raise
            plan = replace(plan, gguf_name=None)
            notes.append(f"there is no GGUF: {error}")
            _write(description, record, plan, job, results)
    left = {"output": str(plan.target), "lossy": _losses(record, plan), "notes": notes}
    return left if left["lossy"] or not job.verify else {**left, "verdict": _verdict(plan, say, description)}


def _output(description: ModelDescription, record: RopeScaling, out: Path, allow_lossy: bool) -> pipeline.OutputPlan:
    """A model folder, and a GGUF in it where one can be written and holds all of the record."""
    from longrope_export.converters.lossy import gguf_losses

    convertible = description.family is not None and description.family.name in pipeline.CONVERTIBLE
    whole = allow_lossy or not gguf_losses(record)
    plan = pipeline.plan_output(description, record.max_position_embeddings, out, hf=True, gguf=convertible and whole)
    name = f"model-{pipeline.length_name(record.max_position_embeddings)}.gguf"
    return replace(plan, gguf_name=name) if plan.gguf_name else plan


def _notes(out: Path) -> list[str]:
    """What the run that wrote the model remarked."""
    report = out / "report.json"
    return list(json.loads(report.read_text("utf-8"))["notes"]) if report.is_file() else []


def _losses(record: RopeScaling, plan: pipeline.OutputPlan) -> list[str]:
    from longrope_export.converters.lossy import gguf_losses, hf_losses

    return [*hf_losses(record), *(gguf_losses(record) if plan.gguf_name else [])]


def _write(
    description: ModelDescription,
    record: RopeScaling,
    plan: pipeline.OutputPlan,
    job: Job,
    results: Sequence[Mapping[str, Any]],
) -> None:
    from longrope_export.converters.card import CardContents
    from longrope_export.recipe.figure import stage_figure
    from longrope_export.versions import versions

    name = f"{job.model.resolve().name}-{pipeline.length_name(record.max_position_embeddings)}"
    card = CardContents(
        name=name, scaling=record, command=job.command, table=table_of(results),
        table_caption="Perplexity on report documents before and after every stage.",
        figure=stage_figure(results, describe(job.model).window), versions=versions(),
    )  # fmt: skip
    pipeline.write_extended(description, record, plan, card=card, dtype=job.dtype, allow_lossy=job.allow_lossy)


def table_of(results: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Perplexities (and passkeys, where they were asked for) by stage, factors and length, as text cells."""
    measured = [result for result in results if "perplexity" in result]
    if not measured:
        return []
    lengths = list(map(str, sorted({length for result in measured for length in result["lengths"]})))
    header = ["after", "factors", "short set", *(f"{int(length):,}" for length in lengths)]
    return [header] + [
        [result["stage"], name, _cell(result["short"][name]), *(_pair(result, name, length) for length in lengths)]
        for result in measured
        for name in result["perplexity"]
    ]


def _pair(result: Mapping[str, Any], name: str, length: str) -> str:
    found = result["passkeys"].get(name, {}).get(length)
    cell = _cell(result["perplexity"][name].get(length))
    return cell if found is None else f"{cell} ({found:.0%})"


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _verdict(plan: pipeline.OutputPlan, say: Say, description: ModelDescription) -> str:
    from longrope_export.converters.verify import verify
    from longrope_export.extend import PROBE_ABOVE

    say("verifying in transformers and llama.cpp")
    return str(verify(plan.target, probe=description.parameters > PROBE_ABOVE).verdict)
