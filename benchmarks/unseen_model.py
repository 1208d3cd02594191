"""A model, a tokenizer and texts that no default was chosen on: Qwen3's architecture, trained here on the kernel's documentation.

    apt-get download linux-doc-6.1             # or https://packages.debian.org/linux-doc-6.1
    python benchmarks/unseen_model.py linux-doc-6.1_*_all.deb --out unseen --minutes 45
    longrope search unseen/model --to 4x --data unseen/search --out unseen/factors
    longrope eval unseen/model --tasks perplexity --methods pi,ntk,yarn,unseen/factors/longrope.json --to 4x \\
      --lengths 512,2k --data unseen/report --documents 26

Leaves `model/`, and the texts that it was not trained on: `search/` (72 files) and `report/` (26), the longest ones, dealt
by the hash of their names. An interrupted training continues when the command is given again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longrope_export.training.demo_loop import Progress, Settings, keep_freed_memory, train
from longrope_export.training.demo_tokenizer import BOS_ID, train_tokenizer, write_tokenizer

WINDOW, VOCABULARY, SEARCH, REPORT = 512, 4096, 72, 26
LOG_EVERY = 100


def main() -> None:
    """Write the texts, train, and write the model."""
    options = _options()
    texts = rst_texts(options.package)
    kept = split_texts(texts)
    for part in ("search", "report"):
        (options.out / part).mkdir(parents=True, exist_ok=True)
        for name in kept[part]:
            (options.out / part / f"{name}.txt").write_text(texts[name], encoding="utf-8")
    print({part: len(names) for part, names in kept.items()}, flush=True)
    _train(options, [texts[name] for name in kept["train"]])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def rst_texts(package: Path) -> dict[str, str]:
    """Every English .rst file of the package, by its path with dashes."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        root = next(Path(folder).rglob("Documentation"))
        files = sorted(file for file in root.rglob("*.rst.gz") if "translations" not in file.parts)
        return {
            "-".join(file.relative_to(root).parts).removesuffix(".rst.gz"): gzip.decompress(file.read_bytes()).decode()
            for file in files
        }


def split_texts(texts: dict[str, str]) -> dict[str, list[str]]:
    """Names to search on and to report on, both of the longest texts, and to train on."""
    longest = sorted(texts, key=lambda name: len(texts[name]))[-(SEARCH + REPORT) :]
    dealt = sorted(longest, key=lambda name: hashlib.sha256(name.encode()).digest())
    train = sorted(set(texts) - set(longest))
    return {"search": sorted(dealt[:SEARCH]), "report": sorted(dealt[SEARCH:]), "train": train}


def new_model() -> Any:
    """A Qwen3 of 5 layers: heads of 32, three queries a key, queries and keys normalized, RoPE base 50,000."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=288, intermediate_size=768, num_hidden_layers=5, num_attention_heads=9,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=WINDOW, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 50000.0}, bos_token_id=BOS_ID, eos_token_id=BOS_ID,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def _train(options: argparse.Namespace, texts: list[str]) -> None:
    keep_freed_memory()
    tokenizer = train_tokenizer(texts, VOCABULARY)
    ids = np.array([token for each in tokenizer.encode_batch(texts) for token in each.ids], dtype=np.int64)
    settings = Settings(steps=100_000, rows=8, micro_rows=4, data=hashlib.sha256(ids.tobytes()).hexdigest())
    print(f"{len(ids):,} tokens to train on", flush=True)

    def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        starts = np.random.default_rng([settings.seed, step]).integers(0, len(ids) - WINDOW, settings.rows)
        rows = np.stack([np.append(BOS_ID, ids[start : start + WINDOW]) for start in starts])
        return torch.from_numpy(rows), torch.ones(rows.shape)

    def report(progress: Progress) -> None:
        if progress.step % LOG_EVERY == 0:
            tokens = progress.step * settings.rows * WINDOW
            print(f"{time.strftime('%H:%M:%S')} {tokens:,} tokens, loss {progress.loss:.3f}", flush=True)

    model = new_model()
    train(
        model, batch, settings, options.out / "checkpoint.pt", minutes=options.minutes, threads=options.threads,
        report=report,
    )  # fmt: skip
    folder = options.out / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    write_tokenizer(tokenizer, folder, WINDOW)
    print(json.dumps({"parameters": model.num_parameters(), "out": str(folder)}))


if __name__ == "__main__":
    main()
