"""Several candidates as the rows of one forward pass, each with its own cos and sin, against one after another.

    python benchmarks/batched_candidates.py [MODEL] [--lengths 32,64,128,256,512,1024] [--rows N] [--rounds 5] [--threads 1]

The demo model unless another is named, in float32; as many rows as a search takes, 1,024 tokens together and at least two,
unless `--rows` says otherwise. Times are processor seconds of all threads, the best of the rounds; the losses of both ways
are compared.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from common import alternating_seconds, best_ratio, machine

from longrope_export.demo import demo_model_path
from longrope_export.description import describe
from longrope_export.evaluation.documents import load_tokenizer
from longrope_export.evaluation.run import standard_library_rows
from longrope_export.loader import load
from longrope_export.search.objective import PASS_TOKENS, ModelObjective
from longrope_export.search.protocol import SEARCH, Trial
from longrope_export.search.run import numbers_of
from longrope_export.search.space import Candidate, closed_form


def main() -> None:
    """Print one line a length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo_model_path())
    parser.add_argument("--lengths", default="32,64,128,256,512,1024")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    model, tokenizer = load(options.model, dtype=torch.float32), load_tokenizer(options.model)
    numbers = numbers_of(describe(options.model), "4x")
    yarn = closed_form("yarn", numbers).factors
    for length in map(int, options.lengths.split(",")):
        (row,) = standard_library_rows(tokenizer, length, 1)
        objective = ModelObjective(model, numbers, {SEARCH: [row.token_ids]})
        rows = options.rows or max(2, PASS_TOKENS // length)
        powers = [0.5 + index / rows for index in range(rows)]
        candidates = [Candidate(tuple(value**power for value in yarn)) for power in powers]
        trials = tuple(Trial(candidate, SEARCH, 0) for candidate in candidates)
        runs = {"alone": partial(_alone, objective, trials), "together": partial(_together, objective, trials)}
        apart = max(abs(alone - row) for alone, row in zip(*(run() for run in runs.values())))
        seconds = alternating_seconds(runs, options.rounds, clock=time.process_time)
        objective.close()
        print(
            f"{length:,} tokens: {rows} candidates in {min(seconds['alone']):.3f} s one after another, as rows "
            f"{best_ratio(seconds, 'together', 'alone'):.3f} × that; losses apart by {apart:.1e}"
        )


def _alone(objective: ModelObjective, trials: tuple[Trial, ...]) -> list[float]:
    return [objective.measure(trial).loss for trial in trials]


def _together(objective: ModelObjective, trials: tuple[Trial, ...]) -> list[float]:
    return [outcome.loss for outcome in objective.measure_rows(trials)]


if __name__ == "__main__":
    main()
