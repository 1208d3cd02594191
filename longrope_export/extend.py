"""`extend`: describe → factors → files → proof, each step also a command of its own."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from longrope_export import pipeline
from longrope_export.description import ModelDescription, describe
from longrope_export.rope.methods import check_options
from longrope_export.scaling import RopeScaling
from longrope_export.versions import versions

Report = Callable[[str], None]
PROBE_ABOVE = 500_000_000
_FLAGS = {"method_options": "option", "attention_factor": "attention-factor"}


@dataclass(frozen=True, kw_only=True)
class ExtendOptions:
    """Options of `longrope extend`, as on its command line."""

    model: Path
    to: str
    out: Path | None = None
    method: str | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    short: str | None = None
    attention_factor: float | None = None
    data: tuple[Path, ...] = ()
    strategy: str | None = None
    budget: str | None = None
    documents: int | None = None
    seed: int = 0
    purpose: str | None = None
    hf: bool = False
    gguf: bool | None = None
    dtype: str = "f16"
    verify: bool | None = None
    allow_lossy: bool = False
    overwrite: bool = False
    command: str = "longrope extend"

    def __post_init__(self) -> None:
        if (self.method is None) == (not self.data):
            raise click.UsageError("give either --method (closed form) or --data (search)")
        if self.method and (searching := [name for name in ("strategy", "budget", "documents") if getattr(self, name)]):
            raise click.UsageError(f"--{searching[0]} belongs to a search; --method needs none")
        if self.data and (
            own := [name for name in ("method_options", "short", "attention_factor") if getattr(self, name)]
        ):
            raise click.UsageError(f"--{_FLAGS.get(own[0], own[0])} belongs to --method; a search finds its own")


def run_extend(options: ExtendOptions, *, report: Report, dry_run: bool = False) -> dict[str, Any]:
    """Do the main job and return its result, JSON-ready; `report` gets one line per step.

    Raises `LongRopeError` for whatever the user can correct, before heavy work where it can be known then.
    """
    description = describe(options.model)
    target = pipeline.target_length(description, options.to)
    plan = _output(options, description, target)
    plan.check_free(overwrite=options.overwrite)
    if options.data and _runtime(options, plan) == "hf" and plan.gguf_name and not options.allow_lossy:
        raise click.UsageError(
            "--for hf may find what a GGUF cannot hold: add --no-gguf or --allow-lossy, or leave it out"
        )
    result = _header(options, description, target, plan)
    if dry_run:
        return result | {"lossy": [], "notes": ["dry run: nothing was written"]}
    found = (
        _closed_form(options, description, target) if options.method else _searched(options, description, target, plan)
    )
    written = pipeline.write_extended(
        description,
        found.scaling,
        plan,
        card=_card(options, description, target, found) if plan.is_folder else None,
        dtype=options.dtype,
        allow_lossy=options.allow_lossy,
        overwrite=options.overwrite,
        extra_files=[] if found.journal is None else [found.journal],
    )
    if options.data:
        shutil.rmtree(search_folder(plan), ignore_errors=True)
    result |= {"lossy": written.lossy, "notes": written.notes, "scaling": found.scaling.to_dict()}
    result["run"] = _run_lines(written, found.scaling)
    if found.table:
        result["table"] = found.table
    return result | _verified(options, description, written, report)


@dataclass(frozen=True)
class Found:
    """Factors with what is known about them: a table of results, and the journal of the search that gave them."""

    scaling: RopeScaling
    table: list[list[str]]
    caption: str = ""
    journal: Path | None = None


def _output(options: ExtendOptions, description: ModelDescription, target: int) -> pipeline.OutputPlan:
    file = options.out is not None and options.out.suffix.lower() == ".gguf"
    if file and (options.hf or options.gguf is False):
        raise click.UsageError(f"{options.out} is the name of a GGUF file; name a folder for what is asked")
    if description.kind == "gguf":
        plan = pipeline.plan_output(description, target, options.out, hf=options.hf, gguf=True)
        searching_to_file = options.data and options.out is None and not options.hf
        return pipeline.as_folder(plan) if searching_to_file else plan
    convertible = description.family is not None and description.family.name in pipeline.CONVERTIBLE
    gguf = (convertible and options.purpose != "hf") if options.gguf is None else options.gguf
    return pipeline.plan_output(description, target, options.out, hf=not file, gguf=gguf or file)


def _header(
    options: ExtendOptions, description: ModelDescription, target: int, plan: pipeline.OutputPlan
) -> dict[str, Any]:
    return {
        "model": str(options.model),
        "architecture": description.architecture,
        "window": description.window,
        "target": target,
        "method": options.method or options.strategy or "gradient",
        "output": str(plan.target),
        "gguf": plan.gguf_name,
        "hf": plan.hf,
    }


def _closed_form(options: ExtendOptions, description: ModelDescription, target: int) -> Found:
    assert options.method is not None
    check_options(options.method, options.method_options)
    scaling = pipeline.closed_form_scaling(
        description,
        target,
        options.method,
        short=options.short,
        attention_factor=options.attention_factor,
        gguf=description.kind == "gguf" or options.purpose == "gguf",
        **options.method_options,
    )
    return Found(scaling, [])


def _searched(options: ExtendOptions, description: ModelDescription, target: int, plan: pipeline.OutputPlan) -> Found:
    """Search beside the output, in OUT.search, so that a stopped search is continued by the same command."""
    from longrope_export.search.progress import SearchProgress
    from longrope_export.search.run import JOURNAL, SearchConfig, run_search

    given = {"strategy": options.strategy, "budget": options.budget, "documents": options.documents}
    config = SearchConfig(
        model=options.model,
        target=str(target),
        data=options.data,
        out=search_folder(plan),
        seed=options.seed,
        command=options.command,
        runtime=_runtime(options, plan),  # type: ignore[arg-type]
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    with SearchProgress() as progress:
        result = run_search(config, progress)
    names = sorted(result.validation_perplexity, key=lambda name: result.validation_perplexity[name])
    table = [["factors", "search texts", "validation texts"]]
    table += [
        [name, _perplexity(result.search_perplexity.get(name)), _perplexity(result.validation_perplexity[name])]
        for name in names
    ]
    what = "Perplexity" if result.objective == "perplexity" else f"exp of the loss {result.objective}"
    caption = (
        f"{what} at {target:,} tokens; {result.documents} documents to search on, {config.validation_documents} "
        "others to choose on."
    )
    return Found(result.scaling, table, caption, search_folder(plan) / JOURNAL)


def search_folder(plan: pipeline.OutputPlan) -> Path:
    """Where the search for an output keeps its journal until the output is written."""
    return plan.target.with_name(plan.target.name + ".search")


def _runtime(options: ExtendOptions, plan: pipeline.OutputPlan) -> str:
    return options.purpose or ("gguf" if plan.gguf_name else "hf")


def _perplexity(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _card(options: ExtendOptions, description: ModelDescription, target: int, found: Found) -> Any:
    from longrope_export.converters.card import CardContents
    from longrope_export.report.card_figure import factor_figure, search_figure

    source = Path(description.path)
    name = source.stem if description.kind == "gguf" else source.resolve().name
    figure = None if found.journal is None else search_figure(found.journal, found.scaling)
    return CardContents(
        name=f"{name}-{pipeline.length_name(target)}",
        scaling=found.scaling,
        command=options.command,
        table=found.table,
        table_caption=found.caption,
        figure=figure,
        factors=factor_figure(str(options.method), found.scaling) if options.method else None,
        versions=versions(),
    )


def _run_lines(written: pipeline.Written, scaling: RopeScaling) -> list[str]:
    from longrope_export.converters import recipes

    lines = []
    if written.gguf:
        lines += ["", "llama.cpp:", recipes.llama_cpp_recipe(str(written.gguf), scaling)]
        lines += ["Ollama:", recipes.ollama_recipe(str(written.gguf), scaling)]
    where = str(written.folder or written.gguf)
    return [*lines, "transformers:", recipes.gguf_loader_recipe(where)]


def _verified(
    options: ExtendOptions, description: ModelDescription, written: pipeline.Written, report: Report
) -> dict[str, Any]:
    wanted = bool(options.data) if options.verify is None else options.verify
    if not wanted:
        return {}
    from longrope_export.converters.verify import verify

    # RoPE acts in every block: two of them tell as much about a big model at a fraction of its time and memory.
    probe = description.parameters > PROBE_ABOVE
    report("verifying in transformers and llama.cpp" + (", the first two blocks" if probe else ""))
    outcome = verify(written.target, probe=probe)
    return {"verdict": outcome.verdict, "verification": outcome.to_dict()}
