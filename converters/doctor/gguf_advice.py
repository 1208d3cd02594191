"""What to know when a sound GGUF with factors is run: nothing here is wrong in the file."""

from __future__ import annotations

from collections.abc import Iterator

from longrope_export.converters.doctor.findings import Finding
from longrope_export.converters.doctor.gguf_facts import GgufFacts

# llama.cpp loaded these with factors before pull request 21150
_EARLY = ("phi3", "phimoe", "minicpm", "minicpm3", "step35")
# tokenizer.ggml.pre of a family → architectures under whose own name its models come
_OWN_NAMES = {"qwen2": ("qwen", "olmo", "smollm3", "rwkv"), "phi-2": ("phi",), "gpt-4o": ("phi", "gpt")}


def advice(facts: GgufFacts) -> Iterator[Finding]:
    """G25 and G33 to G38 for a file whose factors llama.cpp applies."""
    if not facts.applies_factors:
        return
    original = facts.count("rope.scaling.original_context_length")
    if facts.architecture not in _EARLY:
        detail = f"architecture {facts.architecture} with factors"
        yield facts.finding("G25", detail, "update the runtime, or use static factors (rope_freqs.weight)")
    if original is not None and not facts.is_static:
        yield facts.finding("G33", f"the switch is at {original}", f"use -c {original} for short prompts")
        yield facts.finding("G34", "the context decides between long and short factors", "always pass -c")
        yield facts.finding("G35", "the context of one slot decides", "use unified KV, or -c N × the wanted context")
        yield facts.finding(
            "G36",
            f"the switch is at {original}",
            f"--override-kv {facts.key('rope.scaling.original_context_length')}=int:N moves it",
        )
    yield facts.finding("G37", "factors in a GGUF", "use the model folder there (`longrope export`)")


def adapters(facts: GgufFacts) -> Iterator[Finding]:
    """G38: an adapter fits one architecture name only."""
    if facts.header.get("general.type") == "adapter":
        detail = f"an adapter for architecture {facts.architecture}"
        yield facts.finding("G38", detail, "use it with a base model of that architecture only")
    pre = facts.header.get("tokenizer.ggml.pre")
    own = _OWN_NAMES.get(pre) if isinstance(pre, str) else None
    if own and facts.factor_tensors and not facts.architecture.startswith(own):
        detail = f"a model with {pre}'s tokenizer under the name {facts.architecture}"
        yield facts.finding("G38", detail, f"convert the adapter for {facts.architecture} too")
