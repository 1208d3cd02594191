"""A small folder of results for the report's tests: an evaluation of four methods, a search, a record, a manifest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from longrope_export.files import write_manifest
from longrope_export.rope.methods import method_scaling
from longrope_export.scaling import RopeScaling

WINDOW, TARGET = 256, 1024
LENGTHS, DEPTHS = [256, 512, 1024], [0.25, 0.75]
METHODS = ("unchanged", "pi", "yarn", "longrope")
PERPLEXITIES = {
    "unchanged": [10.0, 40.0, 400.0],
    "pi": [15.0, 14.0, 13.0],
    "yarn": [11.0, 10.0, 9.5],
    "longrope": [10.1, 9.0, 8.0],
}
COMMAND = "longrope eval demo --methods unchanged,pi,yarn --scaling longrope.json --to 4x --out results"
SEARCH_COMMAND = "longrope search ./demo --to 4x --data texts --out factors"


def record(**changes: Any) -> RopeScaling:
    """A record from 256 to 1,024 tokens with 8 pairs; the short set is the original one."""
    values = {
        "rope_theta": 10000.0, "rotary_dim": 16, "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": TARGET, "long_factor": (1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 4.5, 5.0),
        "provenance": {
            "method": "search", "complete": True, "seed": 7,
            "validation_perplexity": {"yarn": math.exp(2.4), "pi": math.exp(2.9), "searched": math.exp(2.2)},
            "search_perplexity": {"yarn": 11.5, "searched": 9.0},
        },
    }  # fmt: skip
    return RopeScaling(**{**values, **changes})


def scalings() -> dict[str, RopeScaling | None]:
    """What each method of the evaluation applies."""
    shape = {"rope_theta": 10000.0, "rotary_dim": 16, "original_max_position_embeddings": WINDOW,
             "max_position_embeddings": TARGET}  # fmt: skip
    closed = {name: method_scaling(name, **shape) for name in ("pi", "yarn")}  # type: ignore[arg-type]
    return {"unchanged": None, **closed, "longrope": record()}


def evaluation(names: dict[str, str] | None = None) -> dict[str, Any]:
    """A result of `longrope eval`; `names` gives some methods other names."""
    called = {name: (names or {}).get(name, name) for name in METHODS}
    return {
        "format": "longrope-eval/1", "command": COMMAND, "window": WINDOW, "lengths": LENGTHS, "seed": 3,
        "runtime": "transformers", "models": [{"name": "demo", "path": "./demo", "parameters": 3148032, "kind": "hf"}],
        "rows": [
            {"name": called[name], "method": "record" if name == "longrope" else name,
             "scaling": None if scaling is None else scaling.to_dict()}
            for name, scaling in scalings().items()
        ],
        "data": {"documents": [{"name": "book.txt", "tokens": 1024}], "sha256": "ab" * 32},
        "tasks": {
            "perplexity": {"rows": {called[name]: _perplexity(name) for name in METHODS}},
            "retention": {"rows": {called[name]: _retention(name) for name in METHODS[1:]}},
            "needle": {"rows": {called[name]: {"forced": grid(name), "generated": None} for name in METHODS}},
            "ruler": {"rows": {called["yarn"]: {"tasks": {"vt": {"lengths": [{"length": 512, "score": 0.625}]}}}}},
        },
        "notes": ["unchanged is made for 256 tokens"], "seconds": 1.5, "versions": {"longrope-export": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def grid(name: str) -> dict[str, Any]:
    """`unchanged` finds the needle inside its window only, the others everywhere but once."""
    right = [[4, 4], [0, 0], [0, 0]] if name == "unchanged" else [[4, 4], [4, 4], [4, 3]]
    return {"lengths": LENGTHS, "depths": DEPTHS, "correct": right, "total": [[4, 4]] * 3}


def _perplexity(name: str) -> dict[str, Any]:
    values = PERPLEXITIES[name]
    spans = [(0, 256), (256, 512), (512, 1024)]
    return {
        "lengths": [
            {"length": length, "perplexity": value, "low": 0.9 * value, "high": 1.1 * value, "difference": None}
            for length, value in zip(LENGTHS, values)
        ],
        "spans": [{"start": a, "end": b, "perplexity": value} for (a, b), value in zip(spans, values)],
    }  # fmt: skip


def _retention(name: str) -> dict[str, Any]:
    ratio = PERPLEXITIES[name][0] / 10.0
    return {part: {"perplexity": 10.0 * ratio, "ratio": ratio, "low": None, "high": None} for part in ("short", "long")}


def journal(path: Path, strategy: str = "gradient") -> Path:
    """A search's journal, written by the search's own class: two closed forms, six steps (or candidates), two choices."""
    from longrope_export.search.journal import Journal
    from longrope_export.search.protocol import Outcome, Trial
    from longrope_export.search.space import Candidate

    def candidate(number: int) -> Candidate:
        return Candidate((1.0,) * 7 + (1.0 + number,))

    trials = [Trial(candidate(number), "validation", text) for number in (1, 2) for text in (0, 1)]
    losses = [2.3, 2.5, 2.8, 3.0]
    gradient = strategy == "gradient"
    for step in range(6):
        texts = [step % 2] if gradient else [0, 1]
        trials += [Trial(candidate(10 + step), "search", text, gradient) for text in texts]
        losses += [2.6 - 0.05 * step + 0.1 * text for text in texts]
    trials += [Trial(candidate(30), "validation", text) for text in (0, 1)]
    losses += [2.1, 2.3]
    header = {
        "model": "m" * 64, "data": "d" * 64, "window": WINDOW, "target": TARGET, "strategy": strategy, "seed": 7,
        "command": SEARCH_COMMAND,
        "configuration": {"documents": 2, "baselines": ["yarn", "pi"], "budget": "9", "objective": "perplexity"},
        "versions": {"longrope-export": "0.1.0"}, "threads": 1, "dtype": "float32",
    }  # fmt: skip
    with Journal(path) as file:
        file.begin(header)
        for number, (trial, loss) in enumerate(zip(trials, losses)):
            file.append(number, trial, Outcome(loss), 0.1)
    return path


def write_results(folder: Path, **names: str) -> Path:
    """`folder` with all of it: eval/result.json, search/{journal.jsonl, longrope.json}, log.jsonl, manifest.json."""
    for part in ("eval", "search"):
        (folder / part).mkdir(parents=True)
    (folder / "eval" / "result.json").write_text(json.dumps(evaluation(names)))
    journal(folder / "search" / "journal.jsonl")
    (folder / "search" / "longrope.json").write_text(record().to_json())
    lines = [json.dumps({"step": step, "loss": 3.0 - 0.1 * step}) for step in range(8)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    write_manifest(folder)
    return folder
