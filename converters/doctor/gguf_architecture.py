"""Checks of what single GGUF architectures demand: YaRN keys, granite, minicpm, step35, phi3; and empty arrays."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from longrope_export.converters.doctor.findings import ERROR, NEEDS_SOURCE, WARNING, Finding
from longrope_export.converters.doctor.gguf_facts import GgufFacts
from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.errors import InputFileError
from longrope_export.formats.gguf_header import STRING

# key → what llama.cpp uses where it does not read the key (llama-hparams.h)
_YARN = {
    "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_beta_fast": (32.0,),
    "rope.scaling.yarn_beta_slow": (1.0,),
}
_BETAS = ("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow")
_YARN_READERS = {"grok": tuple(_YARN), "mistral3": _BETAS}
_GRANITE = ("granite", "granitemoe", "granite_swa", "granitehybrid")
_MAX_PATTERN = 1 << 16


def yarn_keys(facts: GgufFacts) -> Iterator[Finding]:
    """G23: values other than the defaults that the architecture never reads."""
    read = _YARN_READERS.get(facts.architecture, ())
    for name, defaults in _YARN.items():
        value = facts.real(name)
        if value is not None and name not in read and value not in defaults:
            changes = GgufChanges(removed=frozenset({facts.key(name)}))
            detail = f"{facts.key(name)} is {value:g}, and {facts.architecture} is run with {defaults[0]:g}"
            advice = "remove it: nothing reads it; exact YaRN is a record of factors (`longrope extend --method yarn`)"
            yield facts.finding("G23", detail, advice, changes)


def granite(facts: GgufFacts) -> Iterator[Finding]:
    """G24: granite runs without RoPE where rope.scaling.finetuned is false, and demands logit_scale."""
    if facts.architecture not in _GRANITE:
        return
    name = "rope.scaling.finetuned"
    if facts.value(name) is False:
        changes = GgufChanges(entries={facts.key(name): True}) if facts.applies_factors else None
        advice = "set it to true" if changes else "set it to true, unless the model was trained without RoPE"
        severity = ERROR if changes else WARNING
        yield facts.finding("G24", f"{facts.key(name)} is false: RoPE is off", advice, changes, severity)
    if not facts.has("logit_scale"):
        detail = f"{facts.key('logit_scale')} is missing: llama.cpp refuses the file"
        yield facts.finding(
            "G24", detail, f"{NEEDS_SOURCE}; it is logits_scaling in config.json, 1 in a disguised model"
        )


def minicpm(facts: GgufFacts) -> Iterator[Finding]:
    """G26: old builds have minicpm's scales built in."""
    width, layers = facts.count("embedding_length"), facts.count("block_count")
    if facts.architecture != "minicpm" or not facts.factor_tensors or width is None or layers is None:
        return
    built_in = {"embedding_scale": 12.0, "residual_scale": 1.4 / math.sqrt(layers), "logit_scale": 256.0 / width}
    given = {name: facts.real(name) for name in built_in}
    others = [name for name, value in given.items() if value and not math.isclose(value, built_in[name], rel_tol=1e-4)]
    if others:
        yield facts.finding("G26", f"{', '.join(map(facts.key, others))} differ", "run it in a build of 2026")


def step35(facts: GgufFacts) -> Iterator[Finding]:
    """G27: what a model in step35's disguise must have."""
    if facts.architecture != "step35":
        return
    pattern = facts.header.metadata.get(facts.key("attention.sliding_window_pattern"))
    if pattern is None or not pattern.is_array or pattern.array_length > _MAX_PATTERN or pattern.array_type == STRING:
        yield facts.finding("G27", "attention.sliding_window_pattern is no list per layer", NEEDS_SOURCE)
    elif not np.any(facts.header.read_array(pattern.key)):
        yield facts.finding("G27", "no layer has a sliding window: one more, empty layer must have one", NEEDS_SOURCE)
    if facts.header.tensor("output.weight") is None:
        yield facts.finding("G27", "output.weight is missing: step35 cannot tie it to token_embd.weight", NEEDS_SOURCE)
    count, size = facts.count("rope.dimension_count"), facts.head_dim
    lengths = {len(tensor.as_factors()) for tensor in facts.factor_tensors}
    if count is not None and size is not None and count == size and lengths == {size // 2}:
        changes = GgufChanges(entries={facts.key("rope.dimension_count"): 2 * size})
        detail = (
            f"rope.dimension_count is {count}, which step35 halves: {len(facts.factor_tensors)} factor lists do not fit"
        )
        yield facts.finding("G27", detail, f"set it to {2 * size}", changes)


def phi3(facts: GgufFacts) -> Iterator[Finding]:
    """G28: phi3 has square q, and gate and up in one tensor."""
    if facts.architecture != "phi3":
        return
    width, heads, size = facts.count("embedding_length"), facts.count("attention.head_count"), facts.head_dim
    if width and heads and size and heads * size != width:
        detail = f"{heads} heads of {size} values are not the width {width}"
        yield facts.finding("G28", detail, "export the source model as llama or granite: phi3 has no place for it")
    middle = facts.count("feed_forward_length")
    up = facts.header.tensor("blk.0.ffn_up.weight")
    if facts.header.tensor("blk.0.ffn_gate.weight") is not None:
        detail = "blk.0.ffn_gate.weight is a tensor of its own; phi3 has gate and up in one ffn_up.weight"
        yield facts.finding("G28", detail, NEEDS_SOURCE)
    elif up is not None and middle is not None and len(up.shape) == 2 and up.shape[1] != 2 * middle:
        detail = f"blk.0.ffn_up.weight has {up.shape[1]} rows, gate and up of {middle} each are needed"
        yield facts.finding("G28", detail, NEEDS_SOURCE)


def empty_arrays(facts: GgufFacts) -> Iterator[Finding]:
    """G32: gguf-py's tools cannot copy an empty array."""
    for key, entry in facts.header.metadata.items():
        if entry.is_array and not entry.array_length:
            needed = key.startswith("tokenizer.")
            changes = None if needed else GgufChanges(removed=frozenset({key}))
            advice = "keep it: llama.cpp's tokenizer may need it" if needed else "remove the key"
            yield facts.finding("G32", f"{key} is empty", advice, changes)


def unreadable(path: str, error: InputFileError) -> tuple[str, str]:
    """Name of the rule and detail for a header that the reader refuses: G29 for layout, else G31."""
    text = str(error).removeprefix(f"{path} ")
    layout = ("has offset", "general.alignment must", "a tensor name has")
    return ("G29" if any(part in text for part in layout) else "G31"), text
