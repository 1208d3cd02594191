"""An adapter's folder: PEFT's two files, with the factors and the base model that they were trained for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longrope_export.checkpoint import ADAPTER
from longrope_export.errors import InputFileError, LongRopeError, StaleStateError
from longrope_export.files import write_text
from longrope_export.fingerprint import fingerprint
from longrope_export.formats.hf_config import read_json
from longrope_export.formats.records import RECORD_FILE, SAFETENSORS_KEY, read_scaling
from longrope_export.formats.safetensors_header import read_safetensors_header
from longrope_export.loader import Switch, load
from longrope_export.scaling import RopeScaling, short_repr
from longrope_export.training.parameters import LoraOptions, add_lora, trained_weights

WEIGHTS = "adapter_model.safetensors"
BASE = "adapter_base"
_NAME = "default"


def save_adapter(
    model: Any,
    folder: Path,
    scaling: RopeScaling,
    base: str | os.PathLike[str],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter of a PEFT model into an existing folder: config, weights, and `longrope.json`.

    The record says which model `base` (a folder or GGUF file) was, by its fingerprint; it lies in the weights' header
    too. `state` holds the model's weights where they are spread over processes. Raises `LongRopeError` when a trained
    weight is not among those that were written.
    """
    from safetensors.torch import save_file

    record = scaling.with_provenance(**{BASE: {"name": Path(base).name, "fingerprint": fingerprint(base)}})
    tensors = _tensors(model, state)
    _check_complete(model, tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", SAFETENSORS_KEY: record.to_json()})
    config = model.peft_config[_NAME]
    before, config.inference_mode = config.inference_mode, True
    config.save_pretrained(folder)
    config.inference_mode = before
    write_text(folder / RECORD_FILE, record.to_json())


def _tensors(model: Any, state: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    # "auto" would ask the network for the base model's config.
    found = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    # A tied lm_head is there beside its embedding, because PEFT's own loading asks for it; safetensors wants a copy.
    return {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in found.items()}


def _check_complete(model: Any, tensors: Mapping[str, Tensor]) -> None:
    for name, weight in trained_weights(model).items():
        saved = tensors.get(saved_name(name))
        if saved is None or saved.shape != weight.shape:
            raise LongRopeError(f"the trained weight {name} would not be in the adapter; report this")


def saved_name(name: str) -> str:
    """The name in the file of a PEFT model's trained weight."""
    return name.replace(f".modules_to_save.{_NAME}", "").replace(f".{_NAME}", "")


def load_adapter(
    base: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    scaling: RopeScaling | None = None,
    *,
    switch: Switch = "sequence",
    **from_pretrained: Any,
) -> Any:
    """The PEFT model of `base` with its adapter and the adapter's factors applied, in evaluation mode; `merge` merges it.

    Options are `load`'s. Raises `StaleStateError` when the adapter was trained on another base model, or with other
    factors than `scaling`; `InputFileError` when the folder is no adapter that `save_adapter` wrote.
    """
    place = Path(folder)
    record = _record(place)
    _check_base(place, record, base)
    if scaling is not None and _values(scaling) != _values(record):
        raise StaleStateError(
            f"{place} was trained with other factors than the given ones; leave them out to use the adapter's own"
        )
    lora, targets, saved = _settings(place)
    model = add_lora(load(base, record, switch=switch, **from_pretrained), lora, targets, saved)
    _fill(model, place)
    return model.eval()


def _record(folder: Path) -> RopeScaling:
    for name in (ADAPTER, WEIGHTS, RECORD_FILE):
        if not (folder / name).is_file():
            raise InputFileError(f"{folder} has no {name}; it is not an adapter that longrope finetune wrote")
    # Both files carry the record; one that was exchanged is noticed here.
    return read_scaling(folder)


def _check_base(folder: Path, record: RopeScaling, base: str | os.PathLike[str]) -> None:
    known = record.provenance.get(BASE)
    if not isinstance(known, Mapping) or not isinstance(known.get("fingerprint"), str):
        raise InputFileError(f"{folder / RECORD_FILE} does not say which model the adapter is for")
    if known["fingerprint"] != fingerprint(base):
        raise StaleStateError(
            f"{folder} was trained on another model ({short_repr(known.get('name'))}) than {base}: their fingerprints differ"
        )


def _values(scaling: RopeScaling) -> RopeScaling:
    return replace(scaling, provenance={})


def _settings(folder: Path) -> tuple[LoraOptions, list[str], list[str]]:
    """The LoRA of adapter_config.json; nothing else in it is used, since PEFT would follow names of modules and files."""
    config, path = read_json(folder / ADAPTER), folder / ADAPTER
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank != _rank(folder):
        raise InputFileError(f"{path}: r is {short_repr(rank)}, but the weights have rank {_rank(folder)}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not alpha > 0:
        raise InputFileError(f"{path}: lora_alpha is {short_repr(alpha)}; it must be a number above 0")
    for name, plain in (("peft_type", "LORA"), ("use_rslora", False), ("use_dora", False), ("bias", "none")):
        if config.get(name, plain) != plain:
            raise InputFileError(f"{path}: {name} is {short_repr(config[name])}; only {plain!r} is read")
    return (
        LoraOptions(rank, float(alpha)),
        _names(path, config, "target_modules"),
        _names(path, config, "modules_to_save"),
    )


def _names(path: Path, config: Mapping[str, Any], key: str) -> list[str]:
    value = config.get(key) or []
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(name, str) for name in value):
        raise InputFileError(f"{path}: {key} must be a list of names")
    return list(value)


def _rank(folder: Path) -> int:
    tensors = read_safetensors_header(folder / WEIGHTS).tensors
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name and len(tensor.shape) == 2}
    if len(ranks) != 1:
        raise InputFileError(f"{folder / WEIGHTS} holds no LoRA of one rank")
    return int(ranks.pop())


def _fill(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    wanted = _shapes(get_peft_model_state_dict(model, save_embedding_layers=False))
    tensors = load_file(folder / WEIGHTS)
    found = _shapes(tensors)
    if wanted != found:
        odd = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        raise InputFileError(
            f"{folder / WEIGHTS} does not fit the model: {len(odd)} weights differ, the first is {odd[0][:100]}"
        )
    set_peft_model_state_dict(model, tensors)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
