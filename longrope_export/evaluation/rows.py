"""The rows of an evaluation: a model with one way of scaling its RoPE, and which factors a length gets in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longrope_export.description import ModelDescription
from longrope_export.errors import ScalingError
from longrope_export.evaluation.protocol import Side
from longrope_export.scaling import Factors, RopeScaling

# As the file has it; and RoPE without the record that the file carries.
UNCHANGED, PLAIN = "unchanged", "plain"
RECORD, DYNAMIC = "record", "dynamic-ntk"


@dataclass(frozen=True)
class FactorSet:
    """Factors that a forward pass is computed with; `factors` None leaves the model's own rotary embedding.

    Equal labels in one row mean equal rotations: passes over the same tokens may be shared.
    """

    label: str
    factors: Factors | None = None
    attention_factor: float = 1.0
    start_tokens: int = 0


OWN = FactorSet("own")


@dataclass(frozen=True, eq=False)
class ModelRow:
    """One line of the results: a model file and a scaling, `longest` being the longest length of the run.

    `scaling` None rotates as the model does by itself; with `switch` and `context` as in `load`.
    """

    name: str
    model: ModelDescription
    method: str
    scaling: RopeScaling | None
    longest: int
    switch: str = "sequence"
    context: int | None = None

    @property
    def is_reference(self) -> bool:
        """Whether this is the unmodified model, which others are compared with."""
        return self.scaling is None and self.method in (UNCHANGED, PLAIN)

    def factor_set(self, length: int, side: Side = None) -> FactorSet:
        """The set for a sequence of `length` tokens, or the one that `side` asks for whatever the length."""
        if self.method == DYNAMIC or (self.model.rope_type == "dynamic" and self.scaling is None):
            return self._dynamic(self._dynamic_length(length, side))
        if self.scaling is None:
            return self._unscaled()
        if self.scaling.is_static:
            return _of_long(self.scaling, "static")
        return self._of_record(self.scaling, length, side)

    def _of_record(self, scaling: RopeScaling, length: int, side: Side) -> FactorSet:
        window = scaling.original_max_position_embeddings
        decides = self.context if self.switch == "context" and self.context else length
        wanted = side or (self.switch if self.switch in ("short", "long") else None)
        if wanted == "long" or (wanted is None and decides > window):
            return _of_long(scaling, "long")
        # The further short sets are the reference loader's alone, which applies them by length.
        bounds = [bound for bound in sorted(scaling.sets) if decides <= bound < window]
        if wanted is None and self.switch == "sequence" and bounds:
            return _of_short(scaling, f"sets[{bounds[0]}]", scaling.sets[bounds[0]])
        return _of_short(scaling, "short", scaling.short_factor)

    def _dynamic_length(self, length: int, side: Side) -> int:
        return self.longest if side == "long" else self.model.window if side == "short" else length

    def _unscaled(self) -> FactorSet:
        # A model that carries a record is loaded with it: without it means factors of one.
        return OWN if self.model.scaling is None else FactorSet("plain", (1.0,) * (self.model.rotary_dim // 2))

    def _dynamic(self, length: int) -> FactorSet:
        if length <= self.model.window:
            return OWN if self.scaling is None else _of_short(self.scaling, "short", self.scaling.short_factor)
        return self._dynamic_set(length)

    def _dynamic_set(self, length: int) -> FactorSet:
        from longrope_export.pipeline import closed_form_scaling
        from longrope_export.rope.hf_types import factors_from_rope_parameters

        label = f"dynamic@{length}"
        if self.method == DYNAMIC:
            return _of_long(closed_form_scaling(self.model, length, DYNAMIC, current_length=length), label)
        own = factors_from_rope_parameters(
            self.model.rope_parameters,
            rotary_dim=self.model.rotary_dim,
            max_position_embeddings=self.model.window,
            length=length,
        )
        return FactorSet(label, tuple(map(float, own.factors)), own.attention_factor)


def _of_long(scaling: RopeScaling, label: str) -> FactorSet:
    return FactorSet(label, scaling.long_factor, scaling.long_attention_factor, scaling.long_start_tokens)


def _of_short(scaling: RopeScaling, label: str, factors: Factors) -> FactorSet:
    return FactorSet(label, tuple(factors), scaling.short_attention_factor, scaling.short_start_tokens)


@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """What decides the rows: names of methods (or files), record files, and how records switch."""

    methods: tuple[str, ...] = (UNCHANGED,)
    scalings: tuple[Path, ...] = ()
    target: int | None = None
    switch: str = "sequence"
    context: int | None = None


def build_rows(models: Sequence[ModelDescription], options: RowOptions, longest: int) -> tuple[ModelRow, ...]:
    """The rows of every model, methods first, then record files; one model's stand together.

    Raises `ScalingError` for a method that is not known, a record of another model, or a row that is named twice.
    """
    several = len(models) > 1
    wanted = [*((name, False) for name in options.methods), *((str(path), True) for path in options.scalings)]
    rows = [_row(model, *entry, options, longest, several) for model in models for entry in wanted]
    seen: set[str] = set()
    for row in rows:
        if row.name in seen:
            raise ScalingError(f"two rows would be called {row.name!r}; give each method, file and model once")
        seen.add(row.name)
    if options.switch != "sequence" and all(row.scaling is None for row in rows):
        raise ScalingError(f"--switch {options.switch} chooses a record's set, and there is none; give --scaling")
    return tuple(rows)


def _row(
    model: ModelDescription, name: str, is_file: bool, options: RowOptions, longest: int, several: bool
) -> ModelRow:
    method, label, scaling = _scaling(model, name, is_file, options.target or max(longest, model.window))
    if scaling is not None:
        scaling.check_model(model.rotary_dim, model.rope_theta)
    if several:
        label = model_name(model) if label == UNCHANGED else f"{model_name(model)}: {label}"
    return ModelRow(label, model, method, scaling, longest, options.switch, options.context)


def _scaling(model: ModelDescription, name: str, is_file: bool, target: int) -> tuple[str, str, RopeScaling | None]:
    """Method, label and record of a row that was asked for as `name`."""
    from longrope_export.formats.records import read_scaling
    from longrope_export.pipeline import closed_form_scaling
    from longrope_export.rope.methods import METHODS

    if is_file or (name not in (UNCHANGED, PLAIN, *METHODS) and Path(name).exists()):
        return RECORD, Path(name).stem, read_scaling(name)
    if name == UNCHANGED:
        return name, name, model.scaling
    if name == PLAIN:
        return name, name, None
    return name, name, closed_form_scaling(model, target, name)


def model_name(model: ModelDescription) -> str:
    """What a model is called in results: its folder's or its file's name."""
    return Path(model.path).resolve().name.removesuffix(".gguf")
