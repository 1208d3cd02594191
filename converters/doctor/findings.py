"""What the doctor says: rules with fixed names, and findings, each with where, what, and what would mend it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longrope_export.converters.gguf.rewrite import GgufChanges

ERROR, WARNING, INFORMATION = "error", "warning", "information"
SEVERITIES = (ERROR, WARNING, INFORMATION)

# What a finding needs before `--fix` can mend it.
NEEDS_RECORD = "--fix --scaling FILE (longrope.json, or the source model's config.json)"
NEEDS_SOURCE = "the source checkpoint: convert it again with `longrope export`"


@dataclass(frozen=True)
class Rule:
    """One misconfiguration: its name, how bad it is, whom it hurts, and what the user would see."""

    name: str
    severity: str
    condition: str
    runtimes: str
    symptom: str


@dataclass(frozen=True)
class ConfigChanges:
    """Keys of config.json to set and to remove; a path's parts are joined by "/"."""

    entries: Mapping[str, Any] = field(default_factory=dict)
    removed: frozenset[str] = frozenset()


Changes = GgufChanges | ConfigChanges


@dataclass(frozen=True)
class Finding:
    """A rule that holds for one file: `detail` says what was found, `advice` what to do about it.

    `changes` mends it alone; `record_mends`: embedding a record does. `severity` differs from the rule's
    where the file shows that it is harmless, or worse.
    """

    rule: Rule
    path: str
    detail: str
    advice: str
    changes: Changes | None = None
    record_mends: bool = False
    severity: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "severity", self.severity or self.rule.severity)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return {
            "name": self.rule.name,
            "severity": self.severity,
            "path": self.path,
            "detail": self.detail,
            "runtimes": self.rule.runtimes,
            "symptom": self.rule.symptom,
            "fix": self.advice,
            "mended_by": self.mended_by,
        }

    @property
    def mended_by(self) -> str | None:
        """The options that mend it, or None when no option does."""
        if self.changes is not None:
            return "--fix"
        return "--fix --scaling FILE" if self.record_mends else None


def worst_first(findings: list[Finding]) -> list[Finding]:
    """Errors, then warnings, then information, each in the order found."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))
