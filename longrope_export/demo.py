"""The embedded default model: a small Llama with a window of 256 tokens, trained by `longrope_export.training.demo_model`."""

from __future__ import annotations

from pathlib import Path

from longrope_export.errors import InputFileError


def demo_model_path() -> Path:
    """Folder of the embedded model (config, bfloat16 safetensors, tokenizer, card).

    Raises `InputFileError` when the installation came without it.
    """
    folder = Path(__file__).parent / "demo_model"
    if not (folder / "model.safetensors").is_file():
        raise InputFileError(
            f"{folder} holds no model; install the package again, or train one: "
            "python -m longrope_export.training.demo_model --out DIR"
        )
    return folder
