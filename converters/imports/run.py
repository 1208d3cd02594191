"""`import_scaling`: a record from a CSV file of factors, a model's config, or a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path

from longrope_export.checkpoint import Checkpoint
from longrope_export.converters.imports.config_scaling import scaling_from_any_config
from longrope_export.converters.imports.csv_factors import read_factor_csv
from longrope_export.description import describe
from longrope_export.errors import InputFileError, LongRopeError, ScalingError
from longrope_export.formats.gguf_header import MAGIC
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.records import CONFIG_FILE
from longrope_export.rope.formulas import longrope_attention_factor
from longrope_export.scaling import RopeScaling


def import_csv(
    source: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str],
    window: int,
    original: int | None = None,
    short: str | os.PathLike[str] | None = None,
    attention_factor: float | None = None,
    start_tokens: int = 0,
) -> RopeScaling:
    """The record of the long factors in a CSV file, for `model` (a folder or a GGUF file) at `window` tokens.

    A CSV says neither base nor windows, so the model does; its factors are total divisors of the base's
    frequencies. `short` None: ones. `attention_factor` None: √(1 + ln s/ln L), microsoft/LongRoPE's policy
    "su". Raises what `read_factor_csv` and `describe` raise, and `ScalingError`.
    """
    described = describe(model)
    pairs, before = described.rotary_dim // 2, original or described.original_window
    if window < before:
        raise ScalingError(f"the factors are for {window} tokens, fewer than the model's window of {before}")
    if attention_factor is None:
        attention_factor = longrope_attention_factor(window / before, before)
    return RopeScaling(
        rope_theta=described.rope_theta, rotary_dim=described.rotary_dim,
        original_max_position_embeddings=before, max_position_embeddings=window,
        long_factor=read_factor_csv(Path(source), pairs),
        short_factor=() if short is None else read_factor_csv(Path(short), pairs),
        long_attention_factor=attention_factor, short_attention_factor=attention_factor,
        long_start_tokens=start_tokens, provenance={"source": f"CSV {Path(source).name}"},
    )  # fmt: skip


def import_model(
    source: str | os.PathLike[str], *, original: int | None = None, window: int | None = None
) -> RopeScaling:
    """The record of what a config.json, a folder with one, or a GGUF file says of its scaling.

    Raises `InputFileError` when it says none, and what `scaling_from_any_config` and `describe` raise.
    """
    place = Path(source)
    config = place / CONFIG_FILE if place.is_dir() else place
    if config.is_file() and not _is_gguf(config):
        try:
            return scaling_from_any_config(read_json(config), original=original, window=window)
        except LongRopeError as error:
            text = str(error).removeprefix("config.json: ").removeprefix("config.json ")
            raise type(error)(text if str(config) in text else f"{config}: {text}") from None
    if original is not None or window is not None:
        raise InputFileError(f"{place}: the windows of a GGUF file are in its keys; they cannot be given")
    found = Checkpoint(place, describe(place)).scaling
    if found is None:
        raise InputFileError(f"{place} says no rope scaling; there is nothing to import")
    return found


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
