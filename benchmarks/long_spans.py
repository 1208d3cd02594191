"""How much of what a window costs do factors win back? Log-loss of settings on the same text, paired by spans.

    python benchmarks/long_spans.py MODEL --to 4x --data report/ --documents 3 --methods ntk,yarn,factors/longrope.json

Each (setting, document) is one forward pass of L' tokens, whose spans are kept in `--results`: the command may be stopped
and given again.
"window" is the unmodified model on the same tokens in pieces of its own window L: what the model can do. Prints
perplexities, the last setting's Δ log-loss against every other one by spans of 1,024 tokens with a bootstrap's 95 %
interval over the spans, and the share of the gap between the best closed form and "window" that it closes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import bootstrap_interval

from longrope_export.description import ModelDescription, describe
from longrope_export.evaluation.documents import evaluation_rows, load_tokenizer
from longrope_export.evaluation.losses import token_losses
from longrope_export.fingerprint import fingerprint
from longrope_export.formats.records import read_scaling
from longrope_export.lengths import resolve_length
from longrope_export.loader import load
from longrope_export.pipeline import closed_form_scaling
from longrope_export.rope.methods import METHODS
from longrope_export.scaling import RopeScaling

SPAN = 1024
WINDOW = "window"
RESULTS = Path(__file__).resolve().parent / "results" / "smollm2"
Losses = npt.NDArray[np.float32]
# Mean loss and number of scored tokens of each span.
Spans = npt.NDArray[np.float64]


def main() -> None:
    """Measure what is not in `--results` yet, and print."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    description = describe(options.model)
    target = resolve_length(options.to, description.window)
    rows = [
        row.token_ids for row in evaluation_rows(options.data, load_tokenizer(options.model), target, options.documents)
    ]
    spans = {
        name: [_measured(options, description, target, name, record, row) for row in rows]
        for name, record in _settings(options.methods, description, target)
    }
    print("\n".join(report(spans, description.window)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--to", default="4x")
    parser.add_argument("--data", type=Path, action="append", required=True)
    parser.add_argument("--documents", type=int, default=1)
    parser.add_argument(
        "--methods", default="ntk,yarn", help="closed forms and longrope.json files; the last is judged"
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if "," not in options.methods:
        parser.error("--methods takes at least two: the last one is compared with the others")
    return options


def _settings(names: str, description: ModelDescription, target: int) -> list[tuple[str, RopeScaling | None]]:
    found: list[tuple[str, RopeScaling | None]] = [(WINDOW, None)]
    for name in names.split(","):
        record = closed_form_scaling(description, target, name) if name in METHODS else read_scaling(name)
        found.append((name, record))
    return found


def _measured(
    options: argparse.Namespace,
    description: ModelDescription,
    target: int,
    name: str,
    record: RopeScaling | None,
    row: npt.NDArray[np.int64],
) -> Spans:
    setting = "" if record is None else record.to_json()
    text = hashlib.sha256(row.tobytes()).hexdigest()
    identity = f"{fingerprint(options.model)} {options.dtype} {setting} {text}"
    kind = Path(name).stem if record else WINDOW
    file = options.results / f"spans-{kind}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    if not file.exists():
        started = time.perf_counter()
        model = load(options.model, record, dtype=getattr(torch, options.dtype))
        with torch.no_grad():
            losses = _by_window(model, row, description.window) if record is None else _whole(model, row)
        _write(file, {"setting": kind, "length": target, "text": text, "spans": spans_of(losses).tolist()})
        print(f"{name}: {target:,} tokens in {time.perf_counter() - started:.0f} s", flush=True)
    return np.array(json.loads(file.read_text(encoding="utf-8"))["spans"])


def _write(file: Path, result: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(result) + "\n", encoding="utf-8")
    partial.replace(file)


def _whole(model: Any, row: npt.NDArray[np.int64]) -> Losses:
    return np.asarray(token_losses(model, torch.from_numpy(row)[None]).float().numpy())


def _by_window(model: Any, row: npt.NDArray[np.int64], window: int) -> Losses:
    """Every piece of `window` tokens by itself; a piece's first token has no loss and is left as NaN."""
    losses = np.full(len(row) - 1, np.nan, dtype=np.float32)
    for start in range(0, len(row), window):
        piece = row[start : start + window]
        losses[start : start + len(piece) - 1] = _whole(model, piece)
    return losses


def report(spans: dict[str, list[Spans]], window: int) -> list[str]:
    """The lines that are printed."""
    joined = {name: np.concatenate(each) for name, each in spans.items()}
    means = {name: float(np.average(each[:, 0], weights=each[:, 1])) for name, each in joined.items()}
    *others, judged = joined
    lines = [f"{name:<40} perplexity {np.exp(mean):.3f}" for name, mean in means.items()]
    for name in others:
        change = joined[judged][:, 0] - joined[name][:, 0]
        low, high = bootstrap_interval(change)
        lines.append(f"Δ log-loss to {name:<20} {change.mean():+.4f} ({low:+.4f} … {high:+.4f}), {len(change)} spans")
    closed = min((name for name in others if name != WINDOW), key=means.__getitem__)
    gap = means[closed] - means[WINDOW]
    won = (means[closed] - means[judged]) / gap if gap > 0 else float("nan")
    return [
        *lines,
        f"gap of {closed} to the window of {window:,}: {gap:.4f} nats; closed by {judged}: {100 * won:.0f} %",
    ]


def spans_of(losses: Losses) -> Spans:
    """Each span of 1,024 tokens, the last one may be shorter: [spans, 2]."""
    found = [losses[start : start + SPAN].astype(np.float64) for start in range(0, len(losses), SPAN)]
    return np.array([(np.nanmean(each), np.count_nonzero(~np.isnan(each))) for each in found])


if __name__ == "__main__":
    main()
