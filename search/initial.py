"""The factors that a search is told to begin with."""

from __future__ import annotations

import math
from pathlib import Path

from longrope_export.errors import InputFileError, ScalingError
from longrope_export.scaling import RopeScaling
from longrope_export.search.config import SearchConfig
from longrope_export.search.space import Candidate, RopeNumbers


def read_init(config: SearchConfig, numbers: RopeNumbers) -> Candidate | None:
    """The long set of `config.init` (a longrope.json) relative to the model's present factors, or None.

    Raises `InputFileError` when it cannot be read, `ScalingError` when it is for another model.
    """
    if config.init is None:
        return None
    try:
        record = RopeScaling.from_json(Path(config.init).read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputFileError(f"{config.init} cannot be read: {error}") from None
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
    given = config.attention_factor(numbers)
    attention = record.long_attention_factor / numbers.base_attention_factor if given is None else given
    start_tokens = 0 if config.runtime == "gguf" else record.long_start_tokens
    return Candidate(tuple(factors), attention, start_tokens)
