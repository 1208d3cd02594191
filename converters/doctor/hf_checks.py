"""Checks of config.json: every place where two readers of longrope parameters come to different results."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from longrope_export.converters.doctor.findings import ERROR, WARNING, ConfigChanges, Finding
from longrope_export.converters.doctor.gguf_factors import looks_inverted, unusual_factors
from longrope_export.converters.doctor.hf_facts import ORIGINAL, WINDOW, ConfigFacts
from longrope_export.errors import LongRopeError
from longrope_export.formats.hf_scaling import RECORD_KEY, scaling_from_config
from longrope_export.scaling import RopeScaling

_LISTS = ("long_factor", "short_factor")


def factor_lists(facts: ConfigFacts) -> Iterator[Finding]:
    """H01, H02, H21: the two lists."""
    there = [name for name in _LISTS if facts.rope.get(name) is not None]
    if len(there) < 2:
        missing = " and ".join(name for name in _LISTS if name not in there)
        yield facts.record_finding("H02", f"{missing} {'is' if there else 'are'} missing")
    for name in there:
        factors = facts.factors(name)
        if factors is None or (facts.pairs is not None and len(factors) != facts.pairs):
            shown = "no list of numbers" if factors is None else f"a list of {len(factors)}"
            yield facts.record_finding("H01", f"{name} is {shown}; the model has {facts.pairs or 'some'} pairs")
        else:
            yield from _values(facts, name, tuple(factors))


def _values(facts: ConfigFacts, name: str, factors: tuple[float, ...]) -> Iterator[Finding]:
    wrong = [index for index, value in enumerate(factors) if not 0.0 < value < math.inf]
    if wrong:
        yield facts.record_finding("H21", f"{name}[{wrong[0]}] is {factors[wrong[0]]:g}", ERROR)
        return
    unusual = unusual_factors(factors)
    if unusual and looks_inverted(factors):
        yield facts.record_finding("H21", f"{name}: {unusual}; it looks like a list of 1/λ", WARNING)
    elif unusual:
        yield facts.finding("H21", f"{name}: {unusual}", "nothing, when the search found them so")


def window(facts: ConfigFacts) -> Iterator[Finding]:
    """H03, H04, H08: the original window and the extended one."""
    if facts.original is None:
        yield facts.record_finding("H03", f"{ORIGINAL} is missing")
        return
    if facts.count(facts.values, ORIGINAL) is None:
        advice = "for ExLlamaV2 add it; vLLM then serves no longer context by default"
        yield facts.finding("H04", f"{ORIGINAL} stands beside the factors only", advice)
    if facts.window is None or facts.window > facts.original or _is_static(facts):
        return
    factor = facts.real("factor")
    detail = f"{WINDOW} is {facts.window}, {ORIGINAL} is {facts.original}"
    if factor is not None and factor > 1.0 and facts.window == facts.original:
        longer = round(facts.original * factor)
        changes = ConfigChanges({f"{facts.prefix}{WINDOW}": longer})
        yield facts.finding("H08", f"{detail}, factor is {factor:g}", f"set it to {longer}", changes)
    else:
        yield facts.record_finding("H08", detail)


def _is_static(facts: ConfigFacts) -> bool:
    return facts.factors("long_factor") == facts.factors("short_factor")


def names(facts: ConfigFacts) -> Iterator[Finding]:
    """H05 to H07, H22: under which names the parameters stand."""
    old = [place for place, values in facts.places.items() if "type" in values]
    both = [place for place in old if "rope_type" in facts.places[place]]
    if both:
        changes = ConfigChanges(removed=frozenset(f"{place}/type" for place in both))
        yield facts.finding("H05", f"{', '.join(both)} has type and rope_type", "remove type", changes)
    if facts.rope_type == "su":
        renamed = facts.everywhere(rope_type="longrope")
        changes = ConfigChanges(renamed.entries, facts.nowhere("type").removed)
        yield facts.finding("H06", "the rope type is su", "name it longrope", changes)
    if all(place.removeprefix(facts.prefix).startswith("rope_parameters") for place in facts.places):
        entries: dict[str, Any] = {f"{facts.prefix}rope_scaling": dict(facts.rope)}
        theta = facts.rope.get("rope_theta", facts.values.get("rope_theta"))
        if isinstance(theta, (int, float)):
            entries[f"{facts.prefix}rope_theta"] = theta
        yield facts.finding("H07", "there is no rope_scaling", "add it beside rope_parameters", ConfigChanges(entries))
    elif len(facts.places) == 2:
        yield from _differing(facts)


def _differing(facts: ConfigFacts) -> Iterator[Finding]:
    left, right = (_comparable(facts, values) for values in facts.places.values())
    keys = sorted(key for key in {*left, *right} if left.get(key) != right.get(key))
    if keys:
        yield facts.record_finding("H22", f"rope_scaling and rope_parameters differ in {', '.join(keys)[:200]}")


def _comparable(facts: ConfigFacts, values: Mapping[str, Any]) -> dict[str, Any]:
    kind = values.get("rope_type", values.get("type"))
    rest = {key: value for key, value in values.items() if key not in ("type", "rope_type")}
    return {"rope_theta": facts.values.get("rope_theta"), **rest, "rope_type": kind}


def attention(facts: ConfigFacts) -> Iterator[Finding]:
    """H09 to H11: which attention factor runtimes come to."""
    factor, ratio, formula, applied = facts.real("factor"), facts.ratio, facts.formula, facts.attention_factor
    if factor is not None and ratio is not None and ratio > 1.0 and not math.isclose(factor, ratio, rel_tol=1e-6):
        changes = facts.everywhere(factor=ratio, attention_factor=applied)
        advice = f"set it to {ratio:.6g} and write out the attention factor that transformers uses"
        yield facts.finding("H09", f"factor is {factor:g}, the windows' ratio is {ratio:g}", advice, changes)
    short, long = facts.real("short_mscale"), facts.real("long_mscale")
    explicit = facts.real("attention_factor")
    if short is not None or long is not None:
        yield from _mscales(facts, short, long)
    elif explicit is not None and formula is not None and not math.isclose(explicit, formula, rel_tol=1e-5):
        changes = facts.everywhere(short_mscale=explicit, long_mscale=explicit)
        advice = "add short_mscale and long_mscale, which vLLM and SGLang read; the others cannot be told"
        yield facts.finding(
            "H10", f"attention_factor is {explicit:.6g}, the formula gives {formula:.6g}", advice, changes
        )


def _mscales(facts: ConfigFacts, short: float | None, long: float | None) -> Iterator[Finding]:
    applied = facts.attention_factor
    same = [
        value is not None and applied is not None and math.isclose(value, applied, rel_tol=1e-5)
        for value in (short, long)
    ]
    if all(same) or isinstance(facts.record, RopeScaling):  # a record says that the difference is meant
        return
    detail = f"short_mscale is {short}, long_mscale is {long}, transformers applies {applied and round(applied, 6)}"
    if short == long and facts.real("attention_factor") is None:
        yield facts.finding("H11", detail, f"set attention_factor to {long}", facts.everywhere(attention_factor=long))
    else:
        yield facts.record_finding("H11", detail)


def record(facts: ConfigFacts) -> Iterator[Finding]:
    """H23: our own record against the parameters that runtimes read."""
    own = facts.record
    if isinstance(own, str):
        changes = ConfigChanges(removed=frozenset({RECORD_KEY, f"{facts.prefix}{RECORD_KEY}"}))
        yield facts.finding("H23", f"the record is not valid: {own[:200]}", "remove it", changes)
    elif own is not None:
        try:
            scaling_from_config(facts.config)
        except LongRopeError as error:
            yield facts.record_finding("H23", str(error).removeprefix("config.json: "))
