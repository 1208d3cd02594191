"""The factors that a search is told to begin with."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from longrope_export.errors import InputFileError, ScalingError
from longrope_export.scaling import RopeScaling
from longrope_export.search.config import SearchConfig
from longrope_export.search.space import Candidate, RopeNumbers, closed_form


def read_init(config: SearchConfig, numbers: RopeNumbers) -> Candidate | None:
    """The long set of `config.init` (a longrope.json) relative to the model's present factors, or None.

    A record for another length is carried to this one: what it adds to YaRN's log λ and log attention factor there is
    added to YaRN's here. The present factors themselves, a record of no extension, stay what they are.

    Raises `InputFileError` when it cannot be read, `ScalingError` when it is for another model.
    """
    if config.init is None:
        return None
    record = _record(config.init)
    if record.rotary_dim != numbers.rotary_dim:
        raise ScalingError(
            f"{config.init} has {record.rotary_dim // 2} factors, the model needs {numbers.pairs}: another model's"
        )
    if not math.isclose(record.rope_theta, numbers.rope_theta, rel_tol=1e-6):
        raise ScalingError(
            f"{config.init} is for a RoPE base of {record.rope_theta:g}, the model has {numbers.rope_theta:g}: "
            "another model's"
        )
    factors = [total / base for total, base in zip(record.long_factor, numbers.base_factors)]
    if config.keep_long:
        _check_kept(record, config, numbers)
    given = None if config.keep_long else config.attention_factor(numbers)
    attention = record.long_attention_factor / numbers.base_attention_factor if given is None else given
    start_tokens = 0 if config.runtime == "gguf" else record.long_start_tokens
    found = Candidate(tuple(factors), attention, start_tokens)
    return found if config.keep_long else _carried(found, record.max_position_embeddings, numbers, given is None)


def with_kept_long(found: RopeScaling, config: SearchConfig) -> RopeScaling:
    """`found` with the long set of `config.init` as it is written there, to the last bit, and how that was found."""
    assert config.init is not None
    kept = _record(config.init)
    return replace(
        found, long_factor=kept.long_factor, long_attention_factor=kept.long_attention_factor,
        long_start_tokens=kept.long_start_tokens,
        provenance={**found.provenance, "method": kept.provenance.get("method"), "long": dict(kept.provenance)},
    )  # fmt: skip


def _carried(found: Candidate, length: int, numbers: RopeNumbers, with_attention: bool) -> Candidate:
    """`found` for `length` tokens, as the same deviation from YaRN for the target."""
    if not numbers.window < length != numbers.target:
        return found
    there, here = (closed_form("yarn", replace(numbers, target=each)) for each in (length, numbers.target))
    factors = tuple(one * new / old for one, new, old in zip(found.factors, here.factors, there.factors))
    ratio = here.attention_factor / there.attention_factor if with_attention else 1.0
    return replace(found, factors=factors, attention_factor=found.attention_factor * ratio)


def _check_kept(record: RopeScaling, config: SearchConfig, numbers: RopeNumbers) -> None:
    lengths = (record.original_max_position_embeddings, record.max_position_embeddings)
    if lengths != (numbers.short_window, numbers.target):
        raise ScalingError(
            f"{config.init} goes from {lengths[0]:,} to {lengths[1]:,} tokens and the search from "
            f"{numbers.short_window:,} to {numbers.target:,}: --keep-long needs the same lengths"
        )
    if config.runtime == "gguf" and record.long_start_tokens:
        raise ScalingError(f"{config.init} has start tokens, which a GGUF cannot hold; search with --for hf")


def _record(path: Path | str) -> RopeScaling:
    try:
        return RopeScaling.from_json(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{path} cannot be read: {error}") from None
