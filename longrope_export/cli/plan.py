"""`longrope plan`: will the longer window fit, and how long does one evaluation take?"""

from __future__ import annotations

import sys

import click

from longrope_export.cli.common import LENGTH, print_json
from longrope_export.cli.tables import print_table, printable
from longrope_export.description import describe
from longrope_export.lengths import resolve_length
from longrope_export.planning import Estimate, Measurement, Plan, make_plan
from longrope_export.probe import BYTES, run_probe


@click.command()
@click.argument("model")
@click.option("--to", "target", type=LENGTH, required=True, help="The longer window: 32768, 32k or 4x.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of the probe (torch's default).")
@click.option(
    "--dtype",
    type=click.Choice(list(BYTES)),
    default="bfloat16",
    show_default=True,
    help="Weights in the probe.",
)
@click.option("--no-probe", is_flag=True, help="Do not run the model; needs neither torch nor memory.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(model: str, target: str, threads: int | None, dtype: str, no_probe: bool, as_json: bool) -> None:
    """Say whether MODEL, a model folder or a GGUF file, fits at a longer window.

    Shows the KV cache, and from a probe of about 20 seconds on the real model the time and memory of one
    evaluation.

    \b
    Examples:
      longrope plan model.gguf --to 32k
      longrope plan ./Llama-3.2-1B --to 4x --no-probe --json
    """
    description = describe(model)
    length = resolve_length(target, description.original_window)

    def probe() -> tuple[Estimate | None, tuple[str, ...]]:
        click.echo(f"probing {printable(model)} in {dtype} ...", err=True)
        return run_probe(description, length, dtype=dtype, threads=threads, progress=_progress)

    result = make_plan(description, length, probe=None if no_probe else probe)
    if as_json:
        print_json(result.to_dict())
        return
    print_table(_rows(result), title=f"{printable(model)}: {result.window:,} → {result.target:,} tokens")
    print_table(result.runtimes.items(), title="What each runtime will apply")
    notes = [("not measured", line) for line in result.not_measured] + [("!", line) for line in result.warnings]
    if notes:
        print_table(notes, title="Notes")


def _progress(measured: Measurement) -> None:
    print(f"  {measured.length:,} tokens: {duration(measured.seconds)}", file=sys.stderr, flush=True)


def _rows(plan: Plan) -> list[tuple[str, str]]:
    rows = [(f"KV cache, {name}", size(count)) for name, count in plan.kv_cache.items()]
    rows.append(("weights as stored", size(plan.weights)))
    rows += [
        (f"weights + {name} cache", f"{size(count)}{_verdict(plan.fits[name])}") for name, count in plan.needed.items()
    ]
    if plan.available is not None:
        rows.append(("memory available now", size(plan.available)))
    return rows + (_estimate_rows(plan, plan.estimate) if plan.estimate else [])


def _estimate_rows(plan: Plan, estimate: Estimate) -> list[tuple[str, str]]:
    basis = f"{estimate.dtype}, {estimate.threads} threads"
    if estimate.longest < plan.target:
        basis += f", extrapolated from {estimate.longest:,} tokens: expect it to be off by tens of percent"
    rows = [("one evaluation", f"{duration(estimate.seconds)} ({basis})")]
    if estimate.seconds > 1.2 * estimate.quiet_seconds:
        rows.append(("", f"about {duration(estimate.quiet_seconds)} without the other programs that run now"))
    rows.append(("one gradient step", f"about {duration(3 * estimate.seconds)} a text (three evaluations)"))
    if estimate.peak_bytes is not None:
        rows.append(("evaluation's peak memory", f"{size(estimate.peak_bytes)}{_verdict(plan.fits['evaluation'])}"))
    return rows


def _verdict(fits: bool | None) -> str:
    return "" if fits is None else (": fits" if fits else ": does NOT fit in the memory available now")


def size(count: int) -> str:
    """Bytes for people: `720.0 MiB`."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: `0.012 s`, `8.1 s`, `2 min 05 s`, `3 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    if minutes < 60:
        return f"{int(minutes)} min {int(seconds % 60):02d} s"
    return f"{int(minutes // 60)} h {int(minutes % 60):02d} min"
