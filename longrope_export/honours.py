"""What each runtime does with longrope factors for a model, in one line per runtime.

Sources: llama.cpp 0c1e5709, transformers 5.23, Ollama fb307609, mlx-lm d78bf58e, ExLlamaV3 4f8ad01 and vLLM's
`phi3_long_rope_scaled_rope.py`, read or run in 2026.
"""

from __future__ import annotations

from longrope_export.families import Family
from longrope_export.gguf_architectures import IGNORED, GgufArchitecture

_UNKNOWN = "not known here for this architecture"
_REFERENCE = "yes: one set per sequence, cache rebuilt at the switch"
_PHI_CACHE = "yes: per forward; generate() drops its cache at the switch"
_STALE_CACHE = "yes: per forward; keys cached before the switch stay short"

_FROM_FOLDER = {
    "vLLM": "yes: long set for the whole server if max_model_len exceeds the original window; ignores attention_factor",
    "mlx-lm": "long set at every length; ignores attention_factor",
    "ExLlama": "by the allocated length; ignores attention_factor",
}
_FROM_GGUF = {
    "transformers": "no: its GGUF import drops factors; use the reference loader or a model folder",
    "vLLM": "no: its GGUF loader drops factors; pass rope_parameters with --hf-overrides or use a model folder",
    "mlx-lm": "does not read GGUF; use a model folder",
    "ExLlama": "does not read GGUF; use a model folder",
}
RUNTIMES = ("llama.cpp", "Ollama", "transformers", "reference loader", "vLLM", "mlx-lm", "ExLlama")


def honours(family: Family | None, gguf: GgufArchitecture | None, kind: str) -> dict[str, str]:
    """Runtime → what it does with longrope factors in a file of this `kind` ("hf" or "gguf"), in
    `RUNTIMES`' order.
    """
    result = {"llama.cpp": _llama_cpp(gguf), "Ollama": _ollama(gguf)}
    result |= _FROM_GGUF if kind == "gguf" else _from_folder(family)
    result["reference loader"] = _UNKNOWN if family is None else _REFERENCE
    return {runtime: result[runtime] for runtime in RUNTIMES}


def _from_folder(family: Family | None) -> dict[str, str]:
    if family is None:
        return dict.fromkeys(("transformers", *_FROM_FOLDER), _UNKNOWN)
    transformers = _PHI_CACHE if family.name == "phi3" else _STALE_CACHE
    if family.nested_rope:
        others = dict.fromkeys(_FROM_FOLDER, "not known here for rope parameters per layer type")
        return {"transformers": f"{transformers} (nested under full_attention)", **others}
    return {"transformers": transformers, **_FROM_FOLDER}


def _llama_cpp(gguf: GgufArchitecture | None) -> str:
    if gguf is None:
        return _UNKNOWN
    if gguf.honours_factors:
        return f"yes, as GGUF {gguf.name}: long set if the allocated context exceeds the original window"
    if gguf.factors == IGNORED:
        return f"loads the factors and ignores them for GGUF {gguf.name}"
    return f"no: a GGUF {gguf.name} with factors does not load"


def _ollama(gguf: GgufArchitecture | None) -> str:
    if gguf is None or not gguf.honours_factors:
        return _llama_cpp(gguf)
    return (
        "yes, by num_ctx (2026-05-29 or newer); an attention factor other than 1 is applied again at each context shift"
    )
