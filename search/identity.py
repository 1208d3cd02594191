"""What a search is, for its journal's first line: a resume that differs in one of these fields is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from longrope_export import __version__
from longrope_export.placement import compute_devices
from longrope_export.search.config import SearchConfig
from longrope_export.search.documents import Parts, documents_hash
from longrope_export.search.space import Candidate, RopeNumbers


def search_header(
    engine: Mapping[str, Any],
    numbers: RopeNumbers,
    config: SearchConfig,
    parts: Parts,
    init: Candidate | None,
    fingerprint: str,
) -> dict[str, Any]:
    """Model, data, options, seed, versions of a resolved `config`, and what its `engine` adds, JSON-ready."""
    return {
        # Options come before what follows from them: a refusal names the first entry that differs.
        "model": fingerprint,
        "configuration": config.to_header(),
        "window": numbers.window,
        "target": numbers.target,
        "strategy": config.strategy,
        "seed": config.seed,
        "init": None if init is None else init.to_json(),
        "data": documents_hash(parts),
        "versions": _versions(config),
        **engine,
    }


def torch_engine(model: nn.Module) -> dict[str, Any]:
    """Threads, device and dtype of a model that torch runs."""
    # Where weights wait does not change a number; what computes does.
    devices = dict.fromkeys(map(_device, compute_devices(model)))
    return {
        "threads": torch.get_num_threads(),
        "device": ", ".join(devices),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }


def _versions(config: SearchConfig) -> Mapping[str, str]:
    import transformers

    versions = {
        "longrope-export": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if config.method == "cmaes":
        import cmaes

        versions["cmaes"] = cmaes.__version__
    return versions


def _device(device: torch.device) -> str:
    # Other vector units round differently: a search continued on them would not end bit for bit the same.
    if device.type == "cpu":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
