"""Models on more than one device, through accelerate: how that is asked for, and where a placed model computes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longrope_export.errors import InputFileError, LongRopeError

# What accelerate works out by itself; everything else is one device, or a JSON file of {module: device}.
AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
_META = "meta"


def placement_options(device_map: str | None, max_memory: str | None = None) -> dict[str, Any]:
    """`from_pretrained`'s options for a device map (a name of `AUTOMATIC`, a device or a JSON file) and memory limits.

    `max_memory` is `device=size,…` such as `0=20GiB,cpu=60GiB`. Nothing is asked for when both are None. Raises
    `InputFileError` for a file that is no device map, `LongRopeError` for a device that is not there, a limit that is
    no size, or limits without an automatic map.
    """
    if max_memory is not None and device_map not in AUTOMATIC:
        raise LongRopeError(f"--max-memory is for --device-map {', '.join(AUTOMATIC)}: what they may fill")
    options: dict[str, Any] = {}
    if device_map is not None:
        options["device_map"] = _device_map(device_map)
    if max_memory is not None:
        options["max_memory"] = dict(_limit(entry) for entry in max_memory.split(","))
    return options


def _device_map(text: str) -> str | dict[str, Any]:
    if text in AUTOMATIC:
        return text
    if not text.endswith(".json"):
        _check_device(text)
        return text
    try:
        found = json.loads(Path(text).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputFileError(f"the device map {text} cannot be read: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(place, str | int) for place in found.values()):
        raise InputFileError(f'the device map {text} must be one object such as {{"model.embed_tokens": 0, …}}')
    for place in sorted(set(map(str, found.values())) - {"disk"}):
        _check_device(int(place) if place.isdigit() else place)
    return found


def _check_device(name: str | int) -> None:
    try:
        torch.empty(0, device=name)
    # Depending on how torch was built, a device that is missing is any of these.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LongRopeError(f"the device {name!r} cannot be used: {reason}; see --device-map") from None


def _limit(entry: str) -> tuple[int | str, str]:
    match = re.fullmatch(r"\s*(\d+|cpu|mps)\s*=\s*(\d+(?:\.\d+)?\s*[KMGT]i?B)\s*", entry)
    if not match:
        raise LongRopeError(f"the memory limit {entry!r} is not known; write 0=20GiB,cpu=60GiB")
    return int(match[1]) if match[1].isdigit() else match[1], match[2]


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first weight, or the one that computes with it when it lies elsewhere."""
    return compute_devices(model)[0]


def compute_devices(model: nn.Module) -> list[torch.device]:
    """The devices that run the model, the one of the first layers in front."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    asked = [place for hook in hooks if (place := getattr(hook, "execution_device", None)) is not None]
    held = [weight.device for weight in model.parameters() if weight.device.type != _META]
    devices = [torch.device(place) for place in asked]
    first = next(model.parameters()).device
    return list(dict.fromkeys([*([first] if first.type != _META else []), *devices, *held]))


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights lie in another memory than the one that computes, and are brought there for each use."""
    return any(weight.device.type == _META for weight in model.parameters())


def weight_places(model: nn.Module) -> dict[str, int]:
    """Bytes of weights by where they lie: a device, or "disk"."""
    places: dict[str, int] = {}
    for name, weight in model.named_parameters():
        place = str(weight.device) if weight.device.type != _META else _offloaded_to(model, name)
        places[place] = places.get(place, 0) + weight.numel() * weight.element_size()
    return places


def _offloaded_to(model: Any, name: str) -> str:
    found = {prefix: place for prefix, place in model.hf_device_map.items() if f"{name}.".startswith(f"{prefix}.")}
    return str(found[max(found, key=len)]) if found else str(model.hf_device_map.get("", "offloaded"))
