"""Several candidates as the rows of one forward pass, each with its own cos and sin, against one after another.

    python benchmarks/batched_candidates.py [MODEL] [--lengths 128,256,512,2048] [--rows 8] [--rounds 5] [--threads 1]

The demo model unless another is named, in float32. Times are processor seconds of all threads, the best of the rounds; the
losses of both ways are compared.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from common import alternating_seconds, best_ratio, machine

from longrope_export.demo import demo_model_path
from longrope_export.description import describe
from longrope_export.evaluation.documents import load_tokenizer
from longrope_export.evaluation.losses import decoder_states, state_losses
from longrope_export.evaluation.run import standard_library_rows
from longrope_export.loader import load
from longrope_export.rotary import FixedRotary, replace_rotary
from longrope_export.search.run import numbers_of
from longrope_export.search.space import closed_form


def main() -> None:
    """Print one line a length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", default=demo_model_path())
    parser.add_argument("--lengths", default="128,256,512,2048")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine())
    model, tokenizer, description = (
        load(options.model, dtype=torch.float32),
        load_tokenizer(options.model),
        describe(options.model),
    )
    rotary = FixedRotary(description.rope_theta, description.rotary_dim)
    replace_rotary(model, rotary)
    for length in map(int, options.lengths.split(",")):
        numbers = numbers_of(description, "4x")
        yarn = torch.tensor(closed_form("yarn", numbers).factors, dtype=torch.float64)
        factors = torch.stack([yarn ** (0.5 + index / options.rows) for index in range(options.rows)])
        (row,) = standard_library_rows(tokenizer, length, 1)
        ids = torch.from_numpy(row.token_ids)[None]

        def losses(factors: torch.Tensor, ids: torch.Tensor = ids) -> torch.Tensor:
            rotary.set_factors(factors, torch.ones(len(factors)))
            with torch.no_grad():
                states = decoder_states(model, input_ids=ids.expand(len(factors), -1))[:, :-1]
                targets = ids[:, 1:].expand(len(factors), -1)
                return state_losses(model, states.flatten(0, 1), targets.flatten()).view(targets.shape).mean(1)

        def single(factors: torch.Tensor = factors) -> torch.Tensor:
            return torch.cat([losses(each[None]) for each in factors])

        def batched(factors: torch.Tensor = factors) -> torch.Tensor:
            return losses(factors)

        apart = (single() - batched()).abs().max().item()
        seconds = alternating_seconds({"single": single, "batched": batched}, options.rounds, clock=time.process_time)
        print(
            f"{length:,} tokens: {options.rows} candidates in {min(seconds['single']):.3f} s one after another, as rows "
            f"{best_ratio(seconds, 'batched', 'single'):.3f} × that; losses apart by {apart:.1e}"
        )


if __name__ == "__main__":
    main()
