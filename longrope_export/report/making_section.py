"""The part of the page that says how it was all made: exact commands, seeds, versions, hashes, and the folder's files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from xml.etree.ElementTree import Element

from longrope_export.report.elements import definitions, element, folded, table
from longrope_export.report.factor_section import known_records
from longrope_export.report.results import Evaluation
from longrope_export.report.sources import ManifestEntry, Sources
from longrope_export.scaling import RopeScaling


def making_section(sources: Sources) -> Element:
    """Commands first, then what they were run with."""
    parts: list[Element] = [element("h2", "How it was made")]
    commands = [run.command for run in sources.searches] + [each.command for each in sources.evaluations]
    if shown := "\n".join(command for command in commands if command):
        parts += [element("h3", "Commands"), element("pre", shown)]
    for evaluation in sources.evaluations:
        parts += _evaluation(evaluation, len(sources.evaluations) > 1)
    for run in sources.searches:
        if run.versions:
            parts += [element("h3", f"Versions, search: {run.name}"), _versions(run.versions)]
    parts += [_provenance(name, record) for name, record in known_records(sources) if record.provenance]
    parts += _manifest(sources.manifest)
    return element("section", *parts)


def _evaluation(evaluation: Evaluation, several: bool) -> list[Element]:
    name = f": {evaluation.name}" if several else ""
    parts = [element("h3", f"Evaluation{name}"), definitions(evaluation.about)]
    return [*parts, element("h3", f"Versions{name}"), _versions(evaluation.versions)] if evaluation.versions else parts


def _versions(versions: Mapping[str, str]) -> Element:
    return definitions([(name, versions[name]) for name in sorted(versions)])


def _provenance(name: str, record: RopeScaling) -> Element:
    rows = [(key, _short(value)) for key, value in list(record.provenance.items())[:200]]
    return folded(f"Provenance of {name}", definitions(rows))


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 2000 else text[:1997] + "..."


def _manifest(entries: list[ManifestEntry]) -> list[Element]:
    if not entries:
        return []
    rows = [
        [entry.name, f"{entry.size:,}", "yes" if entry.there else "missing or of another size", entry.sha256[:16]]
        for entry in entries
    ]
    files = table("Files of the manifest", ["file", "bytes", "there", "SHA-256 begins"], rows)
    missing = sum(not entry.there for entry in entries)
    state = f"{missing} of {len(entries)} files are missing or of another size." if missing else "All files are there."
    return [element("h3", "Files"), element("p", state), folded("The manifest as a table", files)]
