"""All findings of one model folder's config.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from longrope_export.converters.doctor import hf_advice, hf_checks
from longrope_export.converters.doctor.findings import Finding
from longrope_export.converters.doctor.hf_facts import ConfigFacts
from longrope_export.converters.doctor.hf_rules import HF_RULES
from longrope_export.errors import InputFileError
from longrope_export.formats.hf_config import read_json

Check = Callable[[ConfigFacts], Iterator[Finding]]

CHECKS: tuple[Check, ...] = (
    hf_checks.factor_lists,
    hf_checks.window,
    hf_checks.names,
    hf_checks.attention,
    hf_advice.advice,
)


def examine_config(path: Path) -> list[Finding]:
    """Findings of the config.json at `path`; a file that cannot be parsed is one of them.

    A model without longrope parameters has nothing to find. Raises `InputFileError` when there is no such file, or it is
    a record.
    """
    if not path.is_file():
        raise InputFileError(f"{path} does not exist or is not a file")
    try:
        config = read_json(path)
    except InputFileError as error:
        advice = "restore it from the published model"
        return [Finding(HF_RULES["H24"], str(path), str(error).removeprefix(f"{path} "), advice)]
    if "format" in config and "model_type" not in config:
        raise InputFileError(f"{path} is a record of factors, not a model's configuration; name the model")
    facts = ConfigFacts(path, config)
    found = [finding for check in CHECKS for finding in check(facts)] if facts.is_longrope else []
    return found + list(hf_checks.record(facts))
