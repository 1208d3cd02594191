"""The arms of `benchmarks/search.py`: what each searches with, and one run of it on the demo model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from released_operators import ReleasedSearch

from longrope_export.demo import demo_model_path
from longrope_export.description import describe
from longrope_export.evaluation.documents import load_tokenizer, rows_from_texts
from longrope_export.evaluation.passkey import evaluate_passkey
from longrope_export.evaluation.stdlib_corpus import Split, documents
from longrope_export.fingerprint import fingerprint
from longrope_export.loader import load
from longrope_export.rope.formulas import longrope_attention_factor, wavelength_blend, yarn_kept_share
from longrope_export.rope.frequencies import wavelengths
from longrope_export.search.documents import EARLY
from longrope_export.search.evaluator import Evaluator
from longrope_export.search.executors import InProcess
from longrope_export.search.factors import search_factors, search_parts
from longrope_export.search.journal import Journal
from longrope_export.search.objective import ModelObjective
from longrope_export.search.protocol import SEARCH, Trial
from longrope_export.search.run import SearchConfig, numbers_of
from longrope_export.search.space import Candidate, RopeNumbers, closed_form

Row = npt.NDArray[np.int64]

# Rows that searches draw their documents from, by seed; rows that choose; rows that are only reported on.
POOL, VALIDATION, REPORT = 64, 8, 26
PASSKEYS = 200
# The paper's number of samples.
PAPER_DOCUMENTS = 5
CLOSED_FORMS = ("unchanged", "pi", "ntk", "yarn", "critical-dim")
RELEASED = "released"


@dataclass(frozen=True)
class Arm:
    """One way of searching: `options` of `SearchConfig`, or the released operators.

    `retrieve` asks for passkeys too; `counts_search_alone` leaves what is spent on choosing out of the cost;
    `sees_report` searches on the very documents that are reported on, to see what factors could reach at all.
    """

    name: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)
    documents: int = PAPER_DOCUMENTS
    seeds: tuple[int, ...] = (0, 1, 2)
    retrieve: bool = False
    counts_search_alone: bool = False
    sees_report: bool = False

    @property
    def config(self) -> SearchConfig:
        """The search's configuration, but for the seed."""
        return SearchConfig(documents=self.documents, **{"runtime": "hf", **self.options})


@dataclass(frozen=True)
class Bench:
    """The demo model at one extension, with the rows of every split [tokens] and its tokenizer."""

    model: Any
    tokenizer: Any
    numbers: RopeNumbers
    rows: Mapping[Split, Sequence[Row]]

    @classmethod
    def open(cls, to: str) -> Bench:
        """Load the model in float32, on one thread: arms run beside each other."""
        torch.set_num_threads(1)
        path = demo_model_path()
        numbers, tokenizer = numbers_of(describe(path), to), load_tokenizer(path)
        counts: dict[Split, int] = {"search": POOL, "validation": VALIDATION, "report": REPORT}
        rows = {split: _rows(split, tokenizer, numbers.target, count) for split, count in counts.items()}
        return cls(load(path, dtype=torch.float32), tokenizer, numbers, rows)

    def searched_rows(self, count: int, seed: int) -> list[Row]:
        """The documents of one search: `count` of the pool, in the order that `seed` gives."""
        return [self.rows["search"][index] for index in np.random.default_rng(seed).permutation(POOL)[:count]]

    def candidate(self, name: str) -> Candidate:
        """A closed form with its own attention factor, or "unchanged"."""
        return self.numbers.unchanged() if name == "unchanged" else closed_form(name, self.numbers)


def _rows(split: Split, tokenizer: Any, length: int, count: int) -> list[Row]:
    texts = ((document.name, document.text) for document in documents(split))
    return [row.token_ids for row in rows_from_texts(texts, tokenizer, length, count)]


def run_arm(bench: Bench, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    """Search, or continue; then measure what was found, and the closed forms on the same search documents."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = bench.rows["report"] if arm.sees_report else bench.searched_rows(arm.documents, seed)
    found = _released(bench, rows, seed, folder) if arm.name == RELEASED else _searched(bench, arm, rows, seed, folder)
    candidate, chosen, notes = found
    cost = spent(folder / "journal.jsonl", bench.numbers.target)
    return {"chosen": chosen, "documents": arm.documents, "seed": seed, **cost, "notes": notes,
            "candidate": candidate.to_json(), **measured(bench, candidate, rows, arm.retrieve)}  # fmt: skip


def measured(bench: Bench, candidate: Candidate, search_rows: Sequence[Row], retrieve: bool = True) -> dict[str, Any]:
    """Perplexity on every split, each document's loss on "report", YaRN on the same search rows, and passkeys."""
    rows = {"search": search_rows, "validation": bench.rows["validation"], "report": bench.rows["report"]}
    objective = ModelObjective(bench.model, bench.numbers, rows)
    evaluator = Evaluator(InProcess(objective), {split: len(each) for split, each in rows.items()})
    perplexities = {split: math.exp(evaluator.mean_losses([candidate], split)[0]) for split in rows}
    (yarn,) = evaluator.mean_losses([bench.candidate("yarn")], SEARCH)
    report = evaluator.evaluate([Trial(candidate, "report", index) for index in range(len(rows["report"]))])
    objective.apply([candidate])  # passkeys are scored with the model as the search sees it
    passkeys = evaluate_passkey(bench.model, bench.tokenizer, [bench.numbers.target], PASSKEYS) if retrieve else None
    objective.close()
    right = None if passkeys is None else sum(bool(trial.forced) for trial in passkeys.trials)
    return {"perplexity": perplexities, "yarn_on_search": math.exp(yarn), "report_losses": [each.loss for each in report],
            "passkeys": right}  # fmt: skip


def _searched(
    bench: Bench, arm: Arm, rows: Sequence[Row], seed: int, folder: Path
) -> tuple[Candidate, str, dict[str, Any]]:
    config = replace(arm.config, seed=seed)
    held = bench.rows["validation"][: config.validation_documents]
    result = search_factors(
        bench.model, bench.numbers, [*rows, *held], config, folder / "journal.jsonl",
        fingerprint=fingerprint(demo_model_path()), tokenizer=bench.tokenizer,
    )  # fmt: skip
    record = result.scaling
    found = Candidate(record.long_factor, record.long_attention_factor, record.long_start_tokens)
    provenance = record.provenance or {}
    kept = ("start_tokens_perplexity", "critical_index_perplexity", "validation_perplexity")
    notes = {name: provenance[name] for name in kept if provenance.get(name)}
    (folder / "longrope.json").write_text(record.to_json(), encoding="utf-8")
    return found, result.chosen, notes


def _released(bench: Bench, rows: Sequence[Row], seed: int, folder: Path) -> tuple[Candidate, str, dict[str, Any]]:
    numbers = bench.numbers
    lengths = wavelengths(numbers.rope_theta, numbers.rotary_dim)
    seed_factors = wavelength_blend(yarn_kept_share(lengths, numbers.window), numbers.scale)
    attention = longrope_attention_factor(numbers.scale, numbers.window)
    strategy = ReleasedSearch(seed_factors, numbers, attention, len(rows), seed)
    config = SearchConfig(documents=len(rows), validation_documents=1)
    parts = search_parts([*rows, bench.rows["validation"][0]], numbers, config, 0)
    objective = ModelObjective(bench.model, numbers, parts)
    with Journal(folder / "journal.jsonl") as journal:
        if journal.header is None:
            journal.begin({"strategy": RELEASED, "seed": seed})
        journal.check({"strategy": RELEASED, "seed": seed})
        Evaluator(InProcess(objective), {SEARCH: len(rows)}, journal).run(strategy)
    objective.close()
    return strategy.finalists()[0], RELEASED, {}


def spent(journal: Path, target: int) -> dict[str, float]:
    """Forward passes of `target` tokens (a gradient counts three) on search documents and on others, token-forwards, and
    seconds. A shorter piece counts by its length.
    """
    counts = {"search_forwards": 0.0, "other_forwards": 0.0}
    seconds = 0.0
    for line in journal.read_text(encoding="utf-8").splitlines()[1:]:
        trial = json.loads(line)
        part, _, gradient, _ = trial["of"]
        # What the old window is kept with belongs to the report, not to the search.
        if not part.startswith("short"):
            length = int(part.partition("@")[2] or target)
            searched = part == SEARCH or part.startswith(EARLY)
            counts["search_forwards" if searched else "other_forwards"] += (3 if gradient else 1) * length / target
            seconds += trial["seconds"]
    return {**counts, "token_forwards": sum(counts.values()) * target, "seconds": round(seconds, 1)}
