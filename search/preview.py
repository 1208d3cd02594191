"""What a search would do: its plan, its memory, and the time that follows from a measured probe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from longrope_export.errors import LongRopeError
from longrope_export.search.config import LLAMACPP, SearchConfig
from longrope_export.search.factors import at_once, early_length, new_plan, search_parts, shared_timing
from longrope_export.search.memory import MemoryPlan, memory_plan
from longrope_export.search.objective import ModelObjective
from longrope_export.search.plan import Plan, Timing, expected_seconds
from longrope_export.search.probe import probe
from longrope_export.search.progress import duration
from longrope_export.search.run import opened


@dataclass(frozen=True)
class SearchPreview:
    """The resolved plan of a search that is not run.

    `timing` is of one pass alone, `seconds` of the whole search at that pace, and `memory` of all its processes.
    """

    config: SearchConfig
    window: int
    target: int
    plan: Plan
    timing: Timing
    seconds: float
    memory: MemoryPlan

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "configuration": self.config.to_header(),
            "window": self.window,
            "target": self.target,
            "plan": self.plan.to_json(),
            "timing": asdict(self.timing),
            "seconds": self.seconds,
            "memory": self.memory.to_dict(),
        }

    def lines(self) -> list[str]:
        """For people."""
        config = self.config
        together = f", {at_once(config)} passes at once" if at_once(config) > 1 else ""
        return [
            f"{self.window:,} → {self.target:,} tokens: {config.strategy} on {config.documents} documents, objective "
            f"{config.objective}",
            f"plan: {_work(self.plan, config)}",
            f"memory: {_memory(self.memory, config)}",
            f"one forward pass {self.timing.forward:.2f} s, one gradient {self.timing.gradient:.2f} s",
            f"expected time: {duration(self.seconds)}{together}",
        ]


def preview_search(config: SearchConfig) -> SearchPreview:
    """Load the model, time short passes, and plan; nothing is written. Raises what `run_search` raises before it."""
    if config.engine == LLAMACPP:
        raise LongRopeError("--dry-run measures with torch; leave llamacpp out of --objective to see the plan")
    with opened(config) as inputs:
        numbers = inputs.numbers
        resolved = config.with_texts(len(inputs.rows), inputs.tokenizer, numbers.target).resolve(numbers, inputs.kind)
        bos = getattr(inputs.model.config, "bos_token_id", None)
        parts = search_parts(inputs.rows, numbers, resolved, bos, inputs.tokenizer)
        objective = ModelObjective(inputs.model, numbers, parts)
        try:
            timing = probe(objective, numbers, resolved.method == "gradient", early_length(resolved, numbers))
            plan = new_plan(objective, numbers, resolved, parts, timing)
            memory = _in_all(memory_plan(inputs.model, numbers.target, recompute=objective.recompute), resolved)
        finally:
            objective.close()
    pace, unit = shared_timing(resolved, timing), resolved.mixture.passes(numbers.short_scale)
    seconds = expected_seconds(resolved, plan, pace, unit)
    return SearchPreview(resolved, numbers.window, numbers.target, plan, timing, seconds, memory)


def _in_all(memory: MemoryPlan, config: SearchConfig) -> MemoryPlan:
    """`memory` of every process: each worker has a model and measures; the one that decides keeps its own."""
    if config.executor == "local":
        return memory
    workers = config.worker_count
    # What is offloaded to the disk stays in the model's own file, which all of them read.
    weights = {place: size * (1 if place == "disk" else workers + 1) for place, size in memory.weights.items()}
    return replace(
        memory, weights=weights, evaluation=memory.evaluation * workers, gradient=memory.gradient * workers
    )  # fmt: skip


def _work(plan: Plan, config: SearchConfig) -> str:
    if config.method == "gradient":
        work = f"{plan.steps} steps on {plan.documents_per_step} documents each"
    else:
        work = f"{plan.evaluations} evaluations"
    indices = config.critical_indices or ()
    together = "with" if config.method == "evolution" else "for the best of"
    arms = f", {together} the critical indices {', '.join(map(str, indices))}" if indices else ""
    short = f"; short set: {plan.short_steps} steps" if plan.short_steps else ""
    short = f"; short set: {plan.short_evaluations} evaluations" if plan.short_evaluations else short
    return f"{work}{arms}{short}"


def _memory(memory: MemoryPlan, config: SearchConfig) -> str:
    weights = " + ".join(f"{_size(size)} on {device}" for device, size in memory.weights.items())
    models = "" if config.executor == "local" else f" for {config.worker_count} workers and this process"
    layers = ", layers recomputed" if memory.recomputed_layers else ""
    return (
        f"weights {weights}{models}; evaluations {_size(memory.evaluation)} more, gradients {_size(memory.gradient)}"
        f"{layers} (estimates)"
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
