"""Checks of a GGUF file's scaling keys: window, switch, attention factor, base, and our own record."""

from __future__ import annotations

import math
from collections.abc import Iterator

from longrope_export.converters.doctor.findings import NEEDS_SOURCE, Finding
from longrope_export.converters.doctor.gguf_facts import GgufFacts
from longrope_export.converters.gguf.disguise import DISGUISES
from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.formats.gguf_scaling import FOLDED_KEY, RECORD_KEY
from longrope_export.rope.formulas import longrope_attention_factor
from longrope_export.runtimes.llamacpp import CONTEXT_GRANULE
from longrope_export.scaling import RopeScaling

_ORIGINAL = "rope.scaling.original_context_length"
_ATTENTION = "rope.scaling.attn_factor"
_INTERPOLATING = ("rope.scaling.factor", "rope.scale_linear")


def interpolation(facts: GgufFacts) -> Iterator[Finding]:
    """G11: llama.cpp divides positions by these keys whatever the scaling type is."""
    if not facts.applies_factors:
        return
    found = [name for name in _INTERPOLATING if facts.has(name) and facts.value(name) not in (0.0, 1.0)]
    if found:
        detail = ", ".join(f"{facts.key(name)} is {facts.value(name)}" for name in found)
        yield facts.finding("G11", detail, "remove it", GgufChanges(removed=frozenset(map(facts.key, found))))


def switch(facts: GgufFacts) -> Iterator[Finding]:
    """G12 to G15: where llama.cpp switches, and whether the window reaches beyond."""
    if not facts.applies_factors or facts.is_static:
        return
    original, window = facts.count(_ORIGINAL), facts.count("context_length")
    if original is None:
        yield facts.record_finding("G12", f"{facts.key(_ORIGINAL)} is missing")
        return
    if original % CONTEXT_GRANULE:
        down = original // CONTEXT_GRANULE * CONTEXT_GRANULE
        advice = f"run with at most -c {down} where the short factors are wanted" if down else "use a longer context"
        yield facts.finding("G14", f"{facts.key(_ORIGINAL)} is {original}", advice)
    if window is not None and original >= window:
        detail = f"{facts.key(_ORIGINAL)} is {original}, {facts.key('context_length')} is {window}"
        yield facts.record_finding("G13" if original > window else "G15", detail)


def attention(facts: GgufFacts) -> Iterator[Finding]:
    """G16 to G18: the attention factor."""
    if not facts.applies_factors:
        return
    original, window = facts.count(_ORIGINAL), facts.count("context_length")
    extended = original is not None and window is not None and original < window
    value = facts.real(_ATTENTION)
    if original is not None and window is not None and extended and facts.embedded is None:
        formula = longrope_attention_factor(window / original, original)
        if value is None:
            yield facts.record_finding(
                "G16", f"{facts.key(_ATTENTION)} is missing; transformers' formula gives {formula:.6g}"
            )
        elif not math.isclose(value, formula, rel_tol=1e-4):
            yield facts.record_finding(
                "G17", f"{facts.key(_ATTENTION)} is {value:.6g}, transformers' formula gives {formula:.6g}"
            )
    elif FOLDED_KEY in facts.header.metadata:
        return
    elif value is None and isinstance(facts.embedded, RopeScaling) and facts.embedded.long_attention_factor != 1.0:
        expected = facts.embedded.long_attention_factor
        yield facts.record_finding("G16", f"{facts.key(_ATTENTION)} is missing; the record has {expected:.6g}")
    if value is not None and value != 1.0:
        advice = "keep context shift and cache reuse off"
        if "granite" in DISGUISES.get(facts.architecture, ()):
            advice += "; `longrope convert FILE --scaling RECORD --as granite` writes a file in which they are exact"
        yield facts.finding("G18", f"{facts.key(_ATTENTION)} is {value:.6g}", advice)


def base(facts: GgufFacts) -> Iterator[Finding]:
    """G22: the base of the frequencies."""
    if not facts.applies_factors:
        return
    name = "rope.freq_base"
    if not facts.has(name):
        yield facts.record_finding("G22", f"{facts.key(name)} is missing, so llama.cpp takes 10000")
    elif isinstance(facts.embedded, RopeScaling) and facts.real(name) != facts.embedded.rope_theta:
        detail = f"{facts.key(name)} is {facts.value(name)}, the record was made for {facts.embedded.rope_theta:g}"
        yield facts.record_finding("G22", detail)


def dimension_count(facts: GgufFacts) -> Iterator[Finding]:
    """G20: llama and its kin rotate whole heads only."""
    count, size = facts.count("rope.dimension_count"), facts.head_dim
    if facts.row is None or not facts.row.whole_head or count is None or size is None or count == size:
        return
    lengths = {len(tensor.as_factors()) for tensor in (*facts.factor_tensors, facts.static) if tensor}
    changes = None
    if lengths <= {size // 2}:
        changes = GgufChanges(entries={facts.key("rope.dimension_count"): size})
    advice = NEEDS_SOURCE if changes is None else f"set it to {size}"
    yield facts.finding("G20", f"{facts.key('rope.dimension_count')} is {count}, a head has {size}", advice, changes)


def record(facts: GgufFacts) -> Iterator[Finding]:
    """G39: our own record against what llama.cpp reads."""
    own = facts.embedded
    if own is None:
        return
    if isinstance(own, str):
        changes = GgufChanges(removed=frozenset({RECORD_KEY}))
        advice = "remove the record: the tensors and keys say what llama.cpp applies"
        yield facts.finding("G39", f"{RECORD_KEY} is not valid: {own[:200]}", advice, changes)
        return
    if not facts.factor_tensors and facts.static is None:
        yield facts.record_finding("G39", "the file has a record, and no factor tensors")
        return
    names = [name for name, value in _told(facts).items() if value is not None and value != getattr(own, name)]
    if names and facts.row is not None:
        yield facts.record_finding("G39", f"they differ in {', '.join(names)}")


def _told(facts: GgufFacts) -> dict[str, object]:
    """What the file says outside the record, by the record's field; None where it says nothing sound."""
    lists = {"long_factor": facts.long, "short_factor": facts.short}
    factors = {name: tensor.as_factors() if tensor and tensor.is_valid else None for name, tensor in lists.items()}
    return {
        **factors,
        "original_max_position_embeddings": facts.count(_ORIGINAL),
        "max_position_embeddings": facts.count("context_length"),
        "long_attention_factor": facts.real(_ATTENTION),
    }
