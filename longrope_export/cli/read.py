"""`longrope read`: the scaling record, from any file that carries one."""

from __future__ import annotations

import json

import click

from longrope_export.cli.common import print_json
from longrope_export.cli.tables import print_table, span
from longrope_export.formats.records import read_scaling
from longrope_export.scaling import RopeScaling


@click.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON, the form of longrope.json.")
def read(file: str, as_json: bool) -> None:
    """Give the scaling record back from FILE: a longrope.json, a GGUF, a .safetensors file or a model folder.

    \b
    Examples:
      longrope read longer.gguf
      longrope read longer.gguf --json > longrope.json
    """
    scaling = read_scaling(file)
    if as_json:
        print_json(scaling.to_dict())
    else:
        print_record(scaling)


def print_record(record: RopeScaling) -> None:
    """Print a record as a table."""
    print_table(_rows(record))


def _rows(record: RopeScaling) -> list[tuple[str, str]]:
    rows = [
        ("window", f"{record.original_max_position_embeddings:,} → "
        f"{record.max_position_embeddings:,} tokens (× {record.factor:.6g})"),
        ("RoPE", f"{record.rotary_dim} values per head, theta {record.rope_theta:,.10g}"),
        ("long factors", span(record.long_factor)),
        ("short factors", span(record.short_factor)),
        ("attention", f"factor {record.long_attention_factor:.6g} long, "
        f"{record.short_attention_factor:.6g} short"),
        ("start tokens", f"{record.long_start_tokens} long, {record.short_start_tokens} short "
        "(positions left as they were)"),
    ]  # fmt: skip
    rows += [(f"set up to {length:,}", span(factors)) for length, factors in record.sets.items()]
    rows += [
        ("from", f"{name}: {json.dumps(value, ensure_ascii=False)}"[:300]) for name, value in record.provenance.items()
    ]
    return rows
