"""What to know when a sound model folder with longrope is run or converted: nothing here is wrong in it."""

from __future__ import annotations

from collections.abc import Iterator

from longrope_export.converters.doctor.findings import Finding
from longrope_export.converters.doctor.hf_facts import ConfigFacts
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES

_CONVERTED_WELL = ("phi3",)
_OLLAMA_PANICS, _OLLAMA_DROPS = ("qwen2", "qwen3"), ("llama", "mistral")


def advice(facts: ConfigFacts) -> Iterator[Finding]:
    """H12 to H20."""
    name = "a model type not known here" if facts.family is None else facts.family.name
    if name not in _CONVERTED_WELL:
        yield facts.finding("H12", f"a longrope {name}", "longrope export FOLDER --scaling FOLDER --out DIR")
        yield facts.finding("H15", f"a longrope {name}", "longrope_export.load(FOLDER)")
    if name in _OLLAMA_PANICS:
        yield facts.finding("H13", f"a longrope {name}", "give Ollama a GGUF in an architecture that applies factors")
    if name in _OLLAMA_DROPS:
        yield facts.finding("H14", f"a longrope {name}", "give Ollama the GGUF of `longrope export`")
    if facts.original is not None:
        over = f"the original window is {facts.original}"
        yield facts.finding("H16", over, "keep batches on one side of it")
        yield facts.finding("H17", over, f"--max-model-len {facts.original} serves the short factors")
        yield facts.finding("H18", over, "use a runtime that switches where short prompts matter")
    yield from _gguf_targets(facts)


def _gguf_targets(facts: ConfigFacts) -> Iterator[Finding]:
    if facts.family is None:
        return
    row = GGUF_ARCHITECTURES.get(facts.family.gguf_architectures[0])
    if row is not None and not row.honours_factors:
        yield facts.finding(
            "H19", f"GGUF architecture {row.name}", "export it under an architecture that applies factors"
        )
    if facts.family.qk_norm:
        yield facts.finding("H20", f"{facts.family.name} normalises q and k", "use the model folder")
