"""A random model folder of any family, in which nothing is zero or one by initialisation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_random_model(folder: Path, family: str, config: Mapping[str, Any], tokenizer: Any) -> Path:
    """Write a seeded model of `config` with random biases and norms, and the tokenizer, into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "_norm." in name:
            torch.nn.init.normal_(parameter, mean=float("_norm." in name), std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
