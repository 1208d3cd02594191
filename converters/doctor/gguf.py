"""All findings of one GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from longrope_export.converters.doctor import (
    gguf_advice,
    gguf_architecture,
    gguf_factors,
    gguf_keys,
    gguf_rows,
    gguf_shards_check,
)
from longrope_export.converters.doctor.findings import Finding
from longrope_export.converters.doctor.gguf_facts import GgufFacts
from longrope_export.converters.doctor.gguf_rules import GGUF_RULES
from longrope_export.errors import InputFileError
from longrope_export.formats.gguf_header import read_gguf_header

Check = Callable[[GgufFacts], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    gguf_factors.misplaced_tensors,
    gguf_factors.scaling_type,
    gguf_factors.static_beside_factors,
    gguf_factors.loadable,
    gguf_factors.values,
    gguf_factors.single_set,
    gguf_keys.interpolation,
    gguf_keys.switch,
    gguf_keys.attention,
    gguf_keys.base,
    gguf_keys.dimension_count,
    gguf_keys.record,
    gguf_rows.row_order,
    gguf_architecture.yarn_keys,
    gguf_architecture.granite,
    gguf_architecture.minicpm,
    gguf_architecture.step35,
    gguf_architecture.phi3,
    gguf_architecture.empty_arrays,
    gguf_advice.advice,
    gguf_advice.adapters,
)


def examine_gguf(path: Path) -> list[Finding]:
    """Findings of the GGUF file at `path`; a header that cannot be read is one of them.

    Raises `InputFileError` when there is no such file.
    """
    if not path.is_file():
        raise InputFileError(f"{path} does not exist or is not a file")
    try:
        header = read_gguf_header(path)
        found, whole = gguf_shards_check.split(header)
    except InputFileError as error:
        name, detail = gguf_architecture.unreadable(str(path), error)
        return [Finding(GGUF_RULES[name], str(path), detail, "download or convert it again")]
    if whole is None:
        return found
    facts = GgufFacts(whole)
    return found + [finding for check in CHECKS for finding in check(facts)]
