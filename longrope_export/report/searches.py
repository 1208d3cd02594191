"""Reading a search's journal into its progress: losses by evaluations spent, and what they are compared with."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longrope_export.errors import InputFileError
from longrope_export.report.fields import Fields
from longrope_export.report.json_lines import json_lines
from longrope_export.scaling import RopeScaling

# Said here again: the core does not know the search. A test compares both.
FORMAT = "longrope-search-journal/1"
GRADIENT_UNITS = 3.0
SEARCHED = "searched"

Losses = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class SearchRun:
    """A search's progress: (evaluations, loss in nats) of every step or candidate, and of those on validation texts.

    `steps` are single losses of a descent on one document each, or candidates' means over all documents
    (`population`). `closed_forms` are losses on the validation texts by name. An evaluation is one candidate measured on
    all search documents; a gradient counts three.
    """

    name: str
    strategy: str
    window: int | None
    target: int | None
    population: bool
    documents: int
    steps: Losses
    validation: Losses
    closed_forms: Mapping[str, float]
    complete: bool
    about: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    scores: tuple[tuple[str, float | None, float | None, float | None], ...] = ()


def read_search(path: Path, name: str, record: RopeScaling | None = None) -> SearchRun:
    """The search of a journal; `record` is the longrope.json beside it, which knows names and whether it is complete.

    Raises `InputFileError` for a file that is no such journal.
    """
    lines = json_lines(path)
    header = next(lines, None)
    if header is None or header.text("format") != FORMAT:
        raise InputFileError("it is not the journal of a search")
    configuration = header.object("configuration") or Fields({})
    provenance = Fields(record.provenance if record else {}, "provenance")
    tally = _Tally(configuration.integer("documents") or 1, header.integer("target"))
    for line in lines:
        tally.take(line)
    closed = _closed_forms(provenance, configuration, tally.validation)
    known = set(closed.values())
    return SearchRun(
        name=name,
        strategy=header.text("strategy") or "?",
        window=header.integer("window"),
        target=header.integer("target"),
        population=not tally.gradients,
        documents=tally.documents,
        steps=tuple(tally.gradients or tally.candidates),
        validation=tuple((x, loss) for x, loss in tally.means() if not any(_close(loss, each) for each in known)),
        closed_forms=closed,
        complete=provenance.values.get("complete") is True,
        about=tuple(_about(header, configuration)),
        versions=_versions(header),
        command=header.text("command"),
        scores=_scores(provenance),
    )


class _Tally:
    """Adds up trials in the journal's order."""

    def __init__(self, documents: int, target: int | None) -> None:
        self.documents, self.target = documents, target
        self.spent = 0.0
        self.gradients: list[tuple[float, float]] = []
        self.candidates: list[tuple[float, float]] = []
        self.validation: dict[str, tuple[float, list[float]]] = {}
        self._sums: dict[str, list[float]] = {}

    def take(self, line: Fields) -> None:
        part, gradient, candidate = _trial(line)
        loss = line.real("loss")
        if part == "search" or part.startswith("early-search"):
            self.spent += self._units(part) * (GRADIENT_UNITS if gradient else 1.0) / self.documents
            if loss is not None and part == "search":
                self._search(candidate, loss, gradient)
        elif part == "validation" and not gradient:
            known = self.validation.setdefault(candidate, (self.spent, []))
            known[1].append(math.inf if loss is None else loss)

    def means(self) -> list[tuple[float, float]]:
        """(evaluations, mean loss) of the candidates that all validation texts were measured for."""
        most = max((len(losses) for _, losses in self.validation.values()), default=0)
        means = [(x, math.fsum(losses) / most) for x, losses in self.validation.values() if len(losses) == most]
        return [(x, loss) for x, loss in means if math.isfinite(loss)]

    def _search(self, candidate: str, loss: float, gradient: bool) -> None:
        if gradient:
            self.gradients.append((self.spent, loss))
            return
        losses = self._sums.setdefault(candidate, [])
        losses.append(loss)
        if len(losses) == self.documents:
            self.candidates.append((self.spent, math.fsum(losses) / self.documents))

    def _units(self, part: str) -> float:
        length = part.partition("@")[2]
        return int(length) / self.target if self.target and length.isdecimal() and len(length) < 10 else 1.0


def _trial(line: Fields) -> tuple[str, bool, str]:
    values = line.list("of")
    if len(values) != 4 or not isinstance(values[0], str):
        raise InputFileError(f"{line.where} is no trial")
    return values[0], values[2] is True, json.dumps(values[3])


def best_so_far(losses: Losses) -> Losses:
    """The lowest loss up to each point."""
    result: list[tuple[float, float]] = []
    for x, loss in losses:
        result.append((x, min(loss, result[-1][1]) if result else loss))
    return tuple(result)


def running_mean(losses: Losses, width: int) -> Losses:
    """Means of `width` losses in a row, at the place in the middle of them."""
    values = [loss for _, loss in losses]
    return tuple(
        (losses[end - 1 - width // 2][0], math.fsum(values[end - width : end]) / width)
        for end in range(width, len(values) + 1)
    )


def _closed_forms(
    provenance: Fields, configuration: Fields, validation: Mapping[str, tuple[float, list[float]]]
) -> dict[str, float]:
    """Losses of the closed forms on the validation texts: named by the record, or by the order they are measured in."""
    scores = provenance.object("validation_perplexity")
    if scores is not None:
        named = {name: scores.real(name) for name in scores.values if not name.startswith(SEARCHED)}
        return {name: math.log(value) for name, value in named.items() if value}
    names = [str(name) for name in configuration.list("baselines")]
    first = [losses for _, losses in validation.values()][: len(names)]
    means = {name: math.fsum(losses) / len(losses) for name, losses in zip(names, first)}
    return {name: loss for name, loss in means.items() if math.isfinite(loss)}


def _scores(provenance: Fields) -> tuple[tuple[str, float | None, float | None, float | None], ...]:
    """(name, perplexity on search, validation and report texts) of every candidate with a name, the best first."""
    parts = [provenance.object(f"{part}_perplexity") or Fields({}) for part in ("search", "validation", "report")]
    names = dict.fromkeys(name for part in (parts[1], parts[0], parts[2]) for name in part.values)
    rows = [(name, parts[0].real(name), parts[1].real(name), parts[2].real(name)) for name in names]
    return tuple(sorted(rows, key=lambda row: (row[2] is None, row[2] or 0.0)))


def _about(header: Fields, configuration: Fields) -> list[tuple[str, str]]:
    rows: list[tuple[str, Any]] = [
        ("strategy", header.text("strategy")),
        ("objective", configuration.text("objective")),
        ("budget", configuration.values.get("budget")),
        ("documents", configuration.integer("documents")),
        ("seed", header.integer("seed")),
        ("for", configuration.text("runtime")),
        ("dtype", header.text("dtype")),
        ("threads", header.integer("threads")),
        ("device", header.text("device")),
        ("model's fingerprint", header.text("model")),
        ("SHA-256 of the tokens", header.text("data")),
    ]
    return [(name, str(value)[:200]) for name, value in rows if value is not None]


def _versions(header: Fields) -> dict[str, str]:
    found = header.object("versions")
    return {} if found is None else {name: found.text(name) or "" for name in found.values}


def _close(one: float, other: float) -> bool:
    return abs(one - other) < 1e-9
