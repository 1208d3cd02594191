"""`load`: a transformers model that applies a `RopeScaling` exactly."""

from __future__ import annotations

import os
from types import MethodType
from typing import Any, Literal, get_args

from torch import nn
from transformers import GenerationMixin
from transformers.generation.configuration_utils import GenerationMode

from longrope_export.checkpoint import open_checkpoint
from longrope_export.errors import CacheError, LongRopeError, ScalingError
from longrope_export.families import FULL, family_for_config
from longrope_export.formats.hf_scaling import RECORD_KEY, scaling_from_config
from longrope_export.formats.records import read_scaling
from longrope_export.own_rope import own_set
from longrope_export.rotary import (
    Angles,
    FixedRotary,
    RotarySet,
    core_of,
    decoder_of,
    family_of,
    replace_rotary,
    rope_theta_of,
    rotary_dim_of,
)
from longrope_export.scaling import RopeScaling
from longrope_export.switching import RotarySets, SequenceSwitch

Switch = Literal["sequence", "context", "short", "long"]

_STEPWISE = (
    GenerationMode.GREEDY_SEARCH,
    GenerationMode.SAMPLE,
    GenerationMode.BEAM_SEARCH,
    GenerationMode.BEAM_SAMPLE,
)
_HANDLES = "_longrope_handles"


def load(
    path_or_model: str | os.PathLike[str] | nn.Module,
    scaling: RopeScaling | str | os.PathLike[str] | None = None,
    *,
    switch: Switch = "sequence",
    context: int | None = None,
    angles: Angles = "exact",
    **from_pretrained: Any,
) -> Any:
    """A transformers causal language model whose rotary embedding applies `scaling` exactly.

    `path_or_model` is a model folder, a GGUF file (dequantised) or a model in memory (changed in place);
    `scaling` a record, a file that `read_scaling` takes, or None for what the model carries: a record, or linear,
    YaRN or Llama-3 scaling; with plain RoPE or dynamic NTK it keeps transformers' rotary embedding.
    `switch="sequence"` rotates each row with the set of its own length and rebuilds its cache when that changes;
    `"context"` takes the long set for good where `context` exceeds the window L (as llama.cpp and vLLM do);
    `"short"` and `"long"` are fixed. `angles` as in `rotation`. The rest goes to `from_pretrained`.

    Raises `InputFileError`, `UnsupportedModelError` or `ScalingError` when the files, the model type or the
    record do not fit; the model's forward raises `CacheError` where a cache cannot be kept exact.
    """
    _check_options(switch, context, angles, from_pretrained)
    record = read_scaling(scaling) if isinstance(scaling, (str, os.PathLike)) else scaling
    if isinstance(path_or_model, (str, os.PathLike)):
        checkpoint = open_checkpoint(path_or_model)
        record = record or checkpoint.scaling
        if record is not None:  # before the weights are read
            record.check_model(checkpoint.description.rotary_dim, checkpoint.description.rope_theta)
        model = checkpoint.load(**from_pretrained)
    elif from_pretrained:
        raise LongRopeError(
            f"{', '.join(sorted(from_pretrained))}: these options are for a path, not a model in memory"
        )
    else:
        model = path_or_model
        record = record or scaling_from_config(model.config.to_dict())  # type: ignore[operator, union-attr]
    if record is not None:
        apply_scaling(model, record, switch=switch, context=context, angles=angles)
    else:
        _keep_own(model, switch, angles)
    return model


def apply_scaling(
    model: Any,
    scaling: RopeScaling,
    *,
    switch: Switch = "sequence",
    context: int | None = None,
    angles: Angles = "exact",
) -> None:
    """Install `scaling` in a model in memory, in place of an earlier one; arguments, errors as in `load`."""
    model = core_of(model)
    check_scaling(model, scaling)
    sets = RotarySets(scaling, angles)
    rotary = FixedRotary(scaling.rope_theta, scaling.rotary_dim, angles=angles)
    _install(model, rotary)
    _write_config(model, scaling)
    if switch == "sequence" and not scaling.is_static:
        _install_switch(model, rotary, sets)
    else:
        rotary.current = _fixed_set(sets, switch, context)


def _keep_own(model: Any, switch: Switch, angles: Angles) -> None:
    """Install the model's own rope type where it is static, which every `switch` means alike; the config says it."""
    model = core_of(model)
    own = own_set(model, angles)
    if own is not None:
        rotary = FixedRotary(rope_theta_of(model), rotary_dim_of(model), angles=angles)
        rotary.current = own
        _install(model, rotary)
    elif switch != "sequence":
        place = getattr(model.config, "name_or_path", "") or "memory"
        raise ScalingError(
            f'switch="{switch}" needs a scaling record, and the {type(model).__name__} in {place} carries none; '
            "give scaling="
        )


def _install(model: Any, rotary: FixedRotary) -> None:
    remove_switch(model)
    replace_rotary(model, rotary)
    if hasattr(model, "prepare_inputs_for_generation"):
        # Phi3's own version drops the cache of the whole batch at the window; other families have this one.
        model.prepare_inputs_for_generation = MethodType(GenerationMixin.prepare_inputs_for_generation, model)


def check_scaling(model: nn.Module, scaling: RopeScaling) -> None:
    """Raise `ScalingError` when the record is for another rotary_dim or RoPE base than the model's."""
    scaling.check_model(rotary_dim_of(model), rope_theta_of(model))


def remove_switch(model: Any) -> None:
    """Take back the hooks that `switch="sequence"` installed; the rotary embedding stays."""
    model = core_of(model)
    for handle in model.__dict__.pop(_HANDLES, ()):
        handle.remove()
    for name in ("_validate_generation_mode", "prepare_inputs_for_generation"):
        model.__dict__.pop(name, None)


def _check_options(switch: str, context: int | None, angles: str, from_pretrained: dict[str, Any]) -> None:
    if switch not in get_args(Switch):
        raise ScalingError(f"switch is {switch!r}; it must be one of {', '.join(get_args(Switch))}")
    if (switch == "context") != (context is not None):
        raise ScalingError('context is the number of tokens that switch="context" decides by: give both or neither')
    if context is not None and (isinstance(context, bool) or not isinstance(context, int) or context < 1):
        raise ScalingError(f"context is {context!r}; it must be a whole number of tokens above 0")
    if angles not in get_args(Angles):
        raise ScalingError(f"angles is {angles!r}; it must be one of {', '.join(get_args(Angles))}")
    if from_pretrained.get("trust_remote_code"):
        raise LongRopeError("trust_remote_code: code from a model's folder is never run here")


def _fixed_set(sets: RotarySets, switch: Switch, context: int | None) -> RotarySet:
    window = sets.scaling.original_max_position_embeddings
    long = switch == "long" or (context is not None and context > window)
    return sets.long if long else sets.short


def _install_switch(model: Any, rotary: FixedRotary, sets: RotarySets) -> None:
    decoder = decoder_of(model)
    hook = SequenceSwitch(decoder, rotary, sets)
    rotary.current = None
    model.__dict__[_HANDLES] = [
        decoder.register_forward_pre_hook(hook, with_kwargs=True),
        decoder.register_forward_hook(hook.done, always_call=True),
    ]
    if hasattr(model, "_validate_generation_mode"):
        model._validate_generation_mode = MethodType(_only_stepwise, model)


def _only_stepwise(model: Any, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any) -> None:
    """Stands before transformers' own check: modes that take tokens back would keep their entries' set."""
    if generation_mode not in _STEPWISE:
        raise CacheError(
            f"{generation_mode.value.replace('_', ' ')} (assistant model or prompt lookup) is not exact where "
            'a row may pass the window; generate without it, or load with switch="context", "short" or "long"'
        )
    type(model)._validate_generation_mode(model, generation_mode, generation_config, generation_mode_kwargs)


def _write_config(model: Any, scaling: RopeScaling) -> None:
    """Let the config say what the model computes: `save_pretrained` writes it."""
    config = model.config.get_text_config()
    parameters = config.rope_parameters
    flat = parameters.get(FULL, parameters)
    values = {
        "rope_type": "longrope",
        "rope_theta": scaling.rope_theta,
        "long_factor": list(scaling.long_factor),
        "short_factor": list(scaling.short_factor),
        "factor": scaling.factor,
        "attention_factor": scaling.long_attention_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }
    if "partial_rotary_factor" in flat:
        values["partial_rotary_factor"] = flat["partial_rotary_factor"]
    config.rope_parameters = {**parameters, FULL: values} if family_of(model).nested_rope else values
    config.max_position_embeddings = scaling.max_position_embeddings
    if family_for_config(config.model_type).top_level_original:
        config.original_max_position_embeddings = scaling.original_max_position_embeddings
    setattr(model.config, RECORD_KEY, scaling.to_dict())
