"""What a run starts from, checked before anything heavy: the model's description, its record, lengths and positions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from longrope_export.description import ModelDescription, describe
from longrope_export.errors import InputFileError, LongRopeError, ScalingError
from longrope_export.fingerprint import fingerprint
from longrope_export.formats.records import read_scaling
from longrope_export.lengths import resolve_length
from longrope_export.scaling import RopeScaling, to_float32
from longrope_export.training.config import FinetuneConfig
from longrope_export.training.data.rows import RowOptions
from longrope_export.training.positions import Positions
from longrope_export.training.processes import parts_of_a_row

# Schemes whose rows are as long as the positions they reach; the others train on a window.
_WHOLE = ("full", "mixed")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Inputs:
    """The described model, the record it is trained with, how rows are presented, and remarks for the user."""

    description: ModelDescription
    scaling: RopeScaling
    fingerprint: str
    positions: Positions
    rows: RowOptions
    remarks: tuple[str, ...]

    @property
    def window(self) -> int:
        """L: up to here sequences turn with the short set."""
        return self.scaling.original_max_position_embeddings

    @property
    def target(self) -> int:
        """L'."""
        return self.scaling.max_position_embeddings


def check_inputs(config: FinetuneConfig) -> Inputs:
    """Everything about model, record and options that can be wrong without reading texts or weights.

    Raises `LongRopeError` and its kinds: a record for another RoPE base, rotary dim, window or base scaling, an unknown
    optimizer, lengths that do not fit.
    """
    description = describe(config.model)
    scaling = _scaling(config, description)
    _check_record(scaling, description)
    _check_optimizer(config.optimizer)
    positions = _positions(config, scaling)
    _check_group(config, positions.tokens)
    _check_divided_rows(config, positions.tokens)
    found = fingerprint(config.model)
    return Inputs(
        description, scaling, found, positions, _rows(config, positions), tuple(_remarks(scaling, description, found))
    )


def _scaling(config: FinetuneConfig, description: ModelDescription) -> RopeScaling:
    if config.scaling is not None:
        return read_scaling(config.scaling)
    if description.scaling is None:
        raise ScalingError(f"{config.model} carries no longrope factors; give them with --scaling longrope.json")
    return description.scaling


def _check_record(scaling: RopeScaling, description: ModelDescription) -> None:
    scaling.check_model(description.rotary_dim, description.rope_theta)
    window = scaling.original_max_position_embeddings
    if window not in (description.original_window, description.window):
        raise ScalingError(
            f"the scaling switches at {window:,} tokens (original_max_position_embeddings), but the model's window is "
            f"{description.original_window:,}; it was made for another model"
        )
    made_on, bases = _base_of(scaling), _bases(description)
    if made_on is not None and not any(_alike(made_on, base) for base in bases):
        has = bases[0]
        pair = next(index for index, values in enumerate(zip(made_on, has)) if not _alike(values[:1], values[1:]))
        raise ScalingError(
            f"the scaling was made on top of another base scaling than the model's: pair {pair} was divided by "
            f"{made_on[pair]:g} there and is by {has[pair]:g} in the model ({description.rope_type}); it was made for "
            "another model"
        )


def _bases(description: ModelDescription) -> list[tuple[float, ...]]:
    """Divisors that a record for the model may be made on: what it applies now, to short or to long sequences."""
    present = description.scaling
    if present is not None:
        return [present.short_factor, present.long_factor]
    return [description.existing_factors or (1.0,) * (description.rotary_dim // 2)]


def _base_of(scaling: RopeScaling) -> tuple[float, ...] | None:
    """Divisors of the model that a record was made on, where it tells; None where it does not."""
    origin = scaling.provenance
    composed = origin.get("composed_with")
    if isinstance(composed, Mapping) and len(composed.get("factors", ())) == scaling.rotary_dim // 2:
        return tuple(float(value) for value in composed["factors"])
    # Short factors that were left as they were are the base; PI, NTK and YaRN use one set for both.
    return scaling.short_factor if origin.get("short") == "original" else None


def _alike(first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    return all(
        abs(a - b) <= 1e-6 * max(abs(a), abs(b)) for a, b in zip(map(to_float32, first), map(to_float32, second))
    )


def _check_optimizer(name: str) -> None:
    from transformers.training_args import OptimizerNames

    known = sorted(entry.value for entry in OptimizerNames)
    if name not in known:
        raise LongRopeError(f"--optimizer {name!r} is not known; choose one of {', '.join(known)}")


def _positions(config: FinetuneConfig, scaling: RopeScaling) -> Positions:
    window, target = scaling.original_max_position_embeddings, scaling.max_position_embeddings
    whole = config.positions in _WHOLE
    tokens = (target if whole else window) if config.length is None else resolve_length(config.length, window)
    if tokens > target:
        raise ScalingError(
            f"--length is {tokens:,} tokens, and the scaling reaches {target:,} (max_position_embeddings); ask for less"
        )
    if config.positions == "mixed" and tokens <= window:
        raise ScalingError(
            f"--length is {tokens:,} tokens, which no document with long factors fits into (they start above "
            f"{window:,}); ask for more"
        )
    return Positions(
        scheme=config.positions,
        # `full` on shorter rows trains the positions that the rows have.
        target=tokens if whole else target,
        tokens=tokens,
        window=window,
        chunks=config.chunks,
        text_offsets=config.text_offsets,
        alpha=config.alpha,
    )


def _check_group(config: FinetuneConfig, tokens: int) -> None:
    if config.attention == "full":
        return
    group = tokens * config.group_share
    if group < 2 or group % 1 or tokens % int(group):
        raise LongRopeError(
            f"--group-share {config.group_share:g} of {tokens:,} tokens is a group of {group:,.2f} tokens, which does "
            f"not divide the row; choose another share or --length"
        )


def _check_divided_rows(config: FinetuneConfig, tokens: int) -> None:
    """What context parallelism can express: full causal attention over rows of one document."""
    parts = parts_of_a_row()
    if parts == 1:
        return
    if config.attention != "full" or config.positions == "mixed" or config.share_of_long_rows < 1:
        raise LongRopeError(
            "context parallelism attends over whole rows: give --attention full, --long-share 1 and other --positions "
            "than mixed, or a launcher's configuration without it"
        )
    if tokens % (2 * parts):
        raise LongRopeError(
            f"context parallelism over {parts} processes needs rows of a multiple of {2 * parts} tokens"
        )


def _rows(config: FinetuneConfig, positions: Positions) -> RowOptions:
    return RowOptions(
        length=positions.tokens,
        span=positions.text_tokens,
        window=positions.window if positions.window < positions.tokens else None,
        long_share=config.share_of_long_rows,
        packing=config.packing,
        cut_longer=config.cut_longer,
        seed=config.seed,
    )


def _remarks(scaling: RopeScaling, description: ModelDescription, found: str) -> list[str]:
    remarks = []
    origin: Any = scaling.provenance.get("model")
    if isinstance(origin, str) and _FINGERPRINT.fullmatch(origin) and origin != found:
        remarks.append(
            f"the factors were searched on another model of the same shape than {description.path} (a base and its "
            "fine-tune, perhaps); they are used as they are"
        )
    if scaling.sets:
        remarks.append("the record's sets for lengths in between are kept, but not trained with")
    return remarks


def check_output(config: FinetuneConfig) -> None:
    """Raise `InputFileError` when the output folder lies inside the model or the data, which it would change."""
    out = config.out.resolve()
    for source in (config.model, *config.data, *config.eval_data):
        place = source.resolve()
        if out == place or place in out.parents:
            raise InputFileError(f"--out {config.out} lies in {source}, which the run reads; name another folder")
