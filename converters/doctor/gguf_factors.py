"""Checks of a GGUF file's factor tensors: are they there, loadable, and of sound values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np

from longrope_export.converters.doctor.findings import WARNING, Finding
from longrope_export.converters.doctor.gguf_facts import FactorTensor, GgufFacts
from longrope_export.converters.gguf.rewrite import GgufChanges
from longrope_export.formats.ggml_types import type_name
from longrope_export.formats.gguf_description import SCALING_TYPES
from longrope_export.formats.gguf_scaling import LONG_TENSOR, RECORD_KEY, SHORT_TENSOR, STATIC_TENSOR
from longrope_export.gguf_architectures import IGNORED, REFUSED, USED

_TYPE = "rope.scaling.type"


def misplaced_tensors(facts: GgufFacts) -> Iterator[Finding]:
    """G01, G02: rope tensors that the architecture does not load, or loads and ignores."""
    row = facts.row
    if row is None:
        return
    static = row.static if not facts.factor_tensors else USED  # beside factors it is G06's
    for status, tensors in (
        (row.factors, facts.factor_tensors),
        (static, [facts.static] if facts.static else []),
    ):
        names = sorted(tensor.info.name for tensor in tensors)
        if names and status in (REFUSED, IGNORED):
            detail = (
                f"architecture {row.name} {'ignores' if status == IGNORED else 'has no place for'} {', '.join(names)}"
            )
            advice = "take the tensors out: the file then runs plain RoPE; for factors convert the source checkpoint"
            changes = plain_changes(facts, frozenset(names))
            yield facts.finding("G02" if status == IGNORED else "G01", detail, advice, changes)


def plain_changes(facts: GgufFacts, names: frozenset[str]) -> GgufChanges:
    """Take `names` out, and what only makes sense with them; the window is the original one again."""
    keys = ("rope.scaling.original_context_length", "rope.scaling.attn_factor")
    if facts.scaling_type not in ("longrope", None) or not facts.factor_tensors:
        return GgufChanges(dropped=names)
    original, window = facts.count(keys[0]), facts.count("context_length")
    entries = {facts.key("context_length"): original} if original and window and original < window else {}
    removed = frozenset({facts.key(_TYPE), RECORD_KEY, *map(facts.key, keys)})
    return GgufChanges(entries=dict(entries), removed=removed, dropped=names)


def scaling_type(facts: GgufFacts) -> Iterator[Finding]:
    """G03, G04, G05: the scaling type that goes with the tensors."""
    kind, known = facts.scaling_type, facts.row is None or facts.row.honours_factors
    correct = GgufChanges(entries={facts.key(_TYPE): "longrope"})
    if kind is not None and kind not in SCALING_TYPES:
        use = facts.factor_tensors and known
        changes = correct if use else GgufChanges(removed=frozenset({facts.key(_TYPE)}))
        advice = f"llama.cpp knows {', '.join(SCALING_TYPES)}: {'set longrope' if use else 'remove the key'}"
        yield facts.finding("G05", f"{facts.key(_TYPE)} is {kind[:40]!r}", advice, changes)
    elif facts.applies_factors and facts.row and facts.row.needs_type and kind != "longrope":
        yield facts.finding("G04", f"{facts.key(_TYPE)} is {kind or 'missing'}", "set it to longrope", correct)
    elif kind == "longrope" and not facts.factor_tensors and not facts.static:
        yield facts.record_finding("G03", f"{facts.key(_TYPE)} is longrope, and the file has no rope tensors")


def static_beside_factors(facts: GgufFacts) -> Iterator[Finding]:
    """G06: llama.cpp loads `rope_freqs` or long and short factors, never both."""
    if facts.static is None:
        return
    if not facts.factor_tensors:
        if facts.scaling_type == "longrope" and facts.row is not None and facts.row.static == USED:
            changes = GgufChanges(removed=frozenset({facts.key(_TYPE)}))
            yield facts.finding("G06", "rope_freqs.weight with scaling type longrope", "remove the type", changes)
        return
    if not facts.applies_factors:
        return
    detail = "rope_freqs.weight stands beside factor tensors"
    if _composed(facts):
        changes = GgufChanges(dropped=frozenset({STATIC_TENSOR}))
        yield facts.finding("G06", f"{detail}, which contain it already", "take rope_freqs.weight out", changes)
    else:
        yield facts.record_finding("G06", f"{detail}, and whether these contain it cannot be told")


def _composed(facts: GgufFacts) -> bool:
    """Whether the short factors hold the static ones, as a record's total divisors do."""
    short, static = facts.short, facts.static
    if short is None or static is None or short.values is None or static.values is None:
        return False
    if not short.is_valid or not static.is_valid or short.values.shape != static.values.shape:
        return False
    with_own = np.log(static.values.astype(np.float64)).sum()
    return float(np.log(short.values.astype(np.float64)).sum()) >= 0.5 * float(with_own)


def loadable(facts: GgufFacts) -> Iterator[Finding]:
    """G07, G08: type and shape of the factor tensors."""
    if not facts.applies_factors:
        return
    pairs = facts.pairs
    for tensor in facts.factor_tensors:
        name, shape = tensor.info.name, tensor.info.shape
        if tensor.values is None or (pairs is not None and len(tensor.values) != pairs):
            yield facts.record_finding(
                "G08", f"{name} has shape {list(shape)}, {pairs or 'one row of'} values are needed"
            )
        elif not tensor.is_float32:
            changes = GgufChanges(vectors={name: tensor.as_factors()}) if tensor.is_valid else None
            advice = "store it as F32"
            if changes is None:
                yield facts.record_finding("G07", f"{name} is {type_name(tensor.info.ggml_type)}")
            else:
                yield facts.finding("G07", f"{name} is {type_name(tensor.info.ggml_type)}", advice, changes)
    if pairs is None and facts.long and facts.short and facts.long.info.shape != facts.short.info.shape:
        yield facts.record_finding("G08", "the long and the short factor tensor have different lengths")


def values(facts: GgufFacts) -> Iterator[Finding]:
    """G09, G10: what the factors are."""
    if not facts.applies_factors:
        return
    for tensor in facts.factor_tensors:
        if tensor.values is None:
            continue
        if not tensor.is_valid:
            wrong = int(np.flatnonzero(~(np.isfinite(tensor.values) & (tensor.values > 0)))[0])
            detail = f"{tensor.info.name}[{wrong}] is {tensor.values[wrong]:g}"
            yield facts.record_finding("G09", detail)
        else:
            yield from _unusual(facts, tensor)


def _unusual(facts: GgufFacts, tensor: FactorTensor) -> Iterator[Finding]:
    description = unusual_factors(tensor.as_factors())
    if description is None:
        return
    inverted = looks_inverted(tensor.as_factors())
    detail = f"{tensor.info.name}: {description}"
    if inverted:
        found = facts.record_finding("G10", f"{detail}; it looks like a list of 1/λ", WARNING)
        yield found
    else:
        yield facts.finding("G10", detail, "nothing, when the search found them so")


def unusual_factors(factors: tuple[float, ...]) -> str | None:
    """What is unusual in a list of factors above 0, in words; None for a rising list from 1."""
    below = sum(value < 1.0 for value in factors)
    falls = sum(right < left for left, right in itertools.pairwise(factors))
    parts = [f"{below} below 1 (least {min(factors):.4g})"] if below else []
    parts += [f"{falls} smaller than the one before"] if falls else []
    return ", ".join(parts) or None


def looks_inverted(factors: tuple[float, ...]) -> bool:
    """Whether the list looks like 1/λ: nothing above 1, most of it below, and falling on the whole."""
    below = sum(value < 0.999 for value in factors)
    return max(factors) <= 1.001 and 2 * below > len(factors) and factors[-1] < factors[0]


def single_set(facts: GgufFacts) -> Iterator[Finding]:
    """G19: only one of the two sets."""
    if not facts.applies_factors or len(facts.factor_tensors) != 1:
        return
    if facts.short is None and facts.long is not None and facts.long.values is not None and facts.record is None:
        changes = GgufChanges(vectors={SHORT_TENSOR: (1.0,) * len(facts.long.values)})
        advice = "write short factors of 1, which is what llama.cpp applies now; or embed a record that has them"
        yield facts.finding("G19", f"{SHORT_TENSOR} is missing", advice, changes)
    else:
        yield facts.record_finding("G19", f"{SHORT_TENSOR if facts.short is None else LONG_TENSOR} is missing")
