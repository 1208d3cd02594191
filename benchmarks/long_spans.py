"""How much of what a window costs do factors win back? Log-loss of settings on the same text, paired by spans.

    python benchmarks/long_spans.py MODEL --to 4x --data report/ --documents 3 --methods ntk,yarn,factors/longrope.json

Each (setting, document) is one forward pass of L' tokens, kept in `--runs`: the command may be stopped and given again.
"window" is the unmodified model on the same tokens in pieces of its own window L: what the model can do. Prints
perplexities, the last setting's Δ log-loss against every other one by spans of 1,024 tokens with a bootstrap's 95 %
interval over the spans, and the share of the gap between the best closed form and "window" that it closes.
"""

from __future__ import annotations

import argparse
import hashlib
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
Losses = npt.NDArray[np.float32]


def main() -> None:
    """Measure what is not in `--runs` yet, and print."""
    options = _options()
    if options.threads:
        torch.set_num_threads(options.threads)
    description = describe(options.model)
    target = resolve_length(options.to, description.window)
    rows = [
        row.token_ids for row in evaluation_rows(options.data, load_tokenizer(options.model), target, options.documents)
    ]
    losses = {
        name: [_measured(options, description, target, name, record, row) for row in rows]
        for name, record in _settings(options.methods, description, target)
    }
    print("\n".join(report(losses, description.window)))


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
    parser.add_argument("--runs", type=Path, default=Path("runs/spans"))
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
) -> Losses:
    setting = "" if record is None else record.to_json()
    text = hashlib.sha256(row.tobytes()).hexdigest()
    identity = f"{fingerprint(options.model)} {options.dtype} {setting} {text}"
    file = options.runs / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.npy"
    if not file.exists():
        started = time.perf_counter()
        model = load(options.model, record, dtype=getattr(torch, options.dtype))
        with torch.no_grad():
            losses = _by_window(model, row, description.window) if record is None else _whole(model, row)
        options.runs.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        with partial.open("wb") as out:
            np.save(out, losses)
        partial.replace(file)
        print(f"{name}: {target:,} tokens in {time.perf_counter() - started:.0f} s", flush=True)
    return np.asarray(np.load(file))


def _whole(model: Any, row: npt.NDArray[np.int64]) -> Losses:
    return np.asarray(token_losses(model, torch.from_numpy(row)[None]).float().numpy())


def _by_window(model: Any, row: npt.NDArray[np.int64], window: int) -> Losses:
    """Every piece of `window` tokens by itself; a piece's first token has no loss and is left as NaN."""
    losses = np.full(len(row) - 1, np.nan, dtype=np.float32)
    for start in range(0, len(row), window):
        piece = row[start : start + window]
        losses[start : start + len(piece) - 1] = _whole(model, piece)
    return losses


def report(losses: dict[str, list[Losses]], window: int) -> list[str]:
    """The lines that are printed."""
    means = {name: float(np.nanmean(np.concatenate(each))) for name, each in losses.items()}
    *others, judged = losses
    lines = [f"{name:<40} perplexity {np.exp(mean):.3f}" for name, mean in means.items()]
    for name in others:
        spans = np.concatenate(
            [spans_of(mine) - spans_of(theirs) for mine, theirs in zip(losses[judged], losses[name])]
        )
        low, high = bootstrap_interval(spans)
        lines.append(f"Δ log-loss to {name:<20} {spans.mean():+.4f} ({low:+.4f} … {high:+.4f}), {len(spans)} spans")
    closed = min((name for name in others if name != WINDOW), key=means.__getitem__)
    gap = means[closed] - means[WINDOW]
    won = (means[closed] - means[judged]) / gap if gap > 0 else float("nan")
    return [
        *lines,
        f"gap of {closed} to the window of {window:,}: {gap:.4f} nats; closed by {judged}: {100 * won:.0f} %",
    ]


def spans_of(losses: Losses) -> npt.NDArray[np.float64]:
    """Mean loss of each span of 1,024 tokens; the last one may be shorter."""
    edges = range(0, len(losses), SPAN)
    return np.array([np.nanmean(losses[start : start + SPAN].astype(np.float64)) for start in edges])


if __name__ == "__main__":
    main()
