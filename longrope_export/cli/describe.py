"""`longrope describe`: a model's RoPE, window, scaling, and which runtimes apply factors."""

from __future__ import annotations

from collections import Counter

import click

from longrope_export.cli.common import print_json
from longrope_export.cli.tables import print_table, span
from longrope_export.description import ModelDescription
from longrope_export.description import describe as describe_model


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def describe(model: str, as_json: bool) -> None:
    """Show the RoPE, window, scaling and runtime support of MODEL, a model folder or a GGUF file.

    Only headers are read, never weights.

    \b
    Examples:
      longrope describe model.gguf
      longrope describe ./SmolLM2-135M-Instruct --json
    """
    description = describe_model(model)
    if as_json:
        print_json(description.to_dict())
        return
    print_table(_facts(description))
    print_table(description.honours.items(), title="Who applies longrope factors")
    if description.warnings:
        print_table([("!", warning) for warning in description.warnings], title="Warnings")


def _facts(model: ModelDescription) -> list[tuple[str, str]]:
    family = model.family.name if model.family else "none known here"
    layout = f", pairs {model.gguf.pair_layout}" if model.kind == "gguf" and model.gguf else ""
    return [
        ("model", f"{model.path} ({'GGUF file' if model.kind == 'gguf' else 'model folder'})"),
        ("architecture", f"{model.architecture} (family {family}{layout})"),
        ("weights", _weights(model)),
        ("layers", f"{model.layers}{_sliding(model)}"),
        (
            "attention",
            f"hidden {model.hidden:,}, {model.heads} heads and {model.kv_heads} KV heads of {model.head_dim}",
        ),
        ("vocabulary", f"{model.vocab:,}"),
        ("RoPE", f"{model.rotary_dim} of {model.head_dim} values per head, theta {model.rope_theta:,.10g}"),
        ("window", f"{model.window:,} tokens"),
        *_scaling(model),
    ]


def _weights(model: ModelDescription) -> str:
    if not model.tensor_bytes:
        return "none in the folder"
    sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in model.tensor_bytes.items())
    return f"{model.parameters:,} parameters ({sizes})"


def _sliding(model: ModelDescription) -> str:
    if model.sliding_window is None:
        return ""
    counts = Counter(model.layer_types)
    parts = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in sorted(counts.items()))
    return f" ({parts}; sliding window {model.sliding_window:,})"


def _scaling(model: ModelDescription) -> list[tuple[str, str]]:
    record = model.scaling
    if record is not None:
        return [
            ("scaling", f"longrope, {record.original_max_position_embeddings:,} → "
            f"{record.max_position_embeddings:,} tokens"),
            ("long factors", span(record.long_factor)),
            ("short factors", span(record.short_factor)),
            ("attention", f"factor {record.long_attention_factor:.6g} long, "
            f"{record.short_attention_factor:.6g} short"),
        ]  # fmt: skip
    if model.existing_factors is None:
        return [("scaling", "none" if model.rope_type == "default" else model.rope_type)]
    shown = {key: value for key, value in model.rope_parameters.items() if isinstance(value, (int, float))}
    text = ", ".join(
        f"{key} {value:,.10g}" for key, value in shown.items() if key not in ("rope_theta", "partial_rotary_factor")
    )
    return [
        ("scaling", f"{model.rope_type}{': ' + text if text else ''}"),
        (
            "factors",
            f"{span(model.existing_factors)}, attention factor {model.existing_attention_factor:.6g}",
        ),
    ]
