"""Parameter types and output helpers that several commands share."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import click

from longrope_export.cli.tables import printable
from longrope_export.lengths import is_length


class LengthType(click.ParamType[str]):
    """A context length: `16384`, `32k`, `1M`, or a multiple of the model's window such as `4x`."""

    name = "length"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text = str(value).strip().lower()
        if not is_length(text):
            self.fail(f"{text[:40]!r} is not a length; write 16384, 32k, 1m or 4x", param, ctx)
        return text


LENGTH = LengthType()
# What a converted GGUF's matrices can be; a test compares with `converters.gguf.encodings.DTYPES`.
GGUF_DTYPE = click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4", "tq2_0", "tq1_0"])


def print_json(value: Any) -> None:
    """Print `value` on stdout as indented JSON."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def result_alone_on_stdout() -> Iterator[None]:
    """What libraries print on stdout meanwhile, from Python or from below it, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def name_values(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, Any]:
    """Callback for repeatable NAME=VALUE options: JSON values (numbers, true, lists), else text."""
    result: dict[str, Any] = {}
    for text in values:
        name, separator, value = text.partition("=")
        if not separator or not name:
            raise click.BadParameter(f"{text!r}: write NAME=VALUE", ctx, param)
        try:
            result[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            result[name.replace("-", "_")] = value
    return result


def quiet_libraries() -> None:
    """Keep transformers' bars and remarks off stderr, where our own progress and errors stand.

    Through the environment, before its import: wrong input is refused without waiting for that.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


# What became of a safetensors shard that was changed in place.
_SHARD_CHANGES = {
    "room": "its header had the room",
    "inserted": "blocks inserted at the front",
    "removed": "blocks cut off at the front",
    "copied": "copied, because this file system cannot insert room",
}


def print_shards(shards: Mapping[str, str]) -> None:
    """One line for each shard: how its header was changed."""
    for name, how in shards.items():
        click.echo(f"{printable(name)}: {_SHARD_CHANGES[how]}")
