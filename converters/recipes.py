"""The lines that run an extended model in each runtime, with the context that makes the long factors apply."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from longrope_export.scaling import RopeScaling


def transformers_recipe(folder: str, scaling: RopeScaling) -> str:
    """Python lines for the reference loader, which switches exactly between the short and the long factors."""
    return (
        "from longrope_export import load\n"
        "from transformers import AutoTokenizer\n\n"
        f"model = load({json.dumps(folder)})  # exact: short factors up to {scaling.original_max_position_embeddings} tokens, "
        "long ones beyond\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})"
    )


def gguf_loader_recipe(file: str) -> str:
    """Python lines that open the GGUF file itself (dequantised) in transformers."""
    return f"from longrope_export import load\n\nmodel = load({json.dumps(file)})"


def llama_cpp_recipe(file: str, scaling: RopeScaling) -> str:
    """Command lines for llama.cpp; `-c` decides which set of factors applies."""
    long, short = scaling.max_position_embeddings, scaling.original_max_position_embeddings
    file = shlex.quote(file)
    lines = [f"llama-server -m {file} -c {long} --no-context-shift    # long window"]
    if not scaling.is_static:
        lines.append(f"llama-server -m {file} -c {short}    # short prompts only: original quality")
    return "\n".join(lines)


def ollama_recipe(file: str, scaling: RopeScaling) -> str:
    """An Ollama Modelfile and the command that takes it; `num_ctx` decides which set of factors applies."""
    name = re.sub(r"[^a-z0-9._-]+", "-", Path(file).stem.lower()).strip("-._") or "model"
    source = file if Path(file).is_absolute() else f"./{file}"
    # Ollama shifts the context by default; its API takes `shift` since 2025-10 (ollama, api/types.go).
    shift = '# in API requests: "shift": false, which keeps the attention factor right\n'
    return (
        f"{shift if scaling.long_attention_factor != 1.0 else ''}"
        f"cat > Modelfile <<'END'\nFROM {source}\nPARAMETER num_ctx {scaling.max_position_embeddings}\nEND\n"
        f"ollama create {name} -f Modelfile && ollama run {name}"
    )


def vllm_recipe(folder: str, scaling: RopeScaling) -> str:
    """Command line for vLLM, which fixes one set of factors by the served length."""
    return f"vllm serve {shlex.quote(folder)} --max-model-len {scaling.max_position_embeddings}"


def mlx_recipe(folder: str, scaling: RopeScaling) -> str:
    """Command line for mlx-lm, which applies the long factors at every length and needs no context."""
    return (
        f"mlx_lm.generate --model {shlex.quote(folder)} --prompt - < long.txt    # the long factors at every length, "
        f"made for {scaling.max_position_embeddings} tokens"
    )
