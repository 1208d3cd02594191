"""Trains the demo model from nothing but the running Python's standard library, and writes its folder and card.

    python -m longrope_export.training.demo_model --out DIR

An interrupted run continues where it was when the same command is given again.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from longrope_export.errors import LongRopeError
from longrope_export.evaluation import passkey
from longrope_export.evaluation.stdlib_corpus import documents, training_tests
from longrope_export.files import atomic_output, write_text
from longrope_export.training.demo_batches import LIBRARY_REPEATS, batch, training_material
from longrope_export.training.demo_card import Run, card, held_out_record, measure
from longrope_export.training.demo_loop import Progress, Settings, keep_freed_memory, train
from longrope_export.training.demo_retrieval import Material
from longrope_export.training.demo_tokenizer import BOS_ID, train_tokenizer, write_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor

# The template's words become whole tokens, so that a prompt leaves room for filler in a small window.
TEMPLATE_REPEATS = 500


@dataclass(frozen=True)
class Shape:
    """The model's shape; rows of every matrix are a multiple of 256 long, so that K-quants work."""

    vocabulary: int = 3072
    window: int = 256
    hidden: int = 256
    intermediate: int = 512
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2


def new_model(shape: Shape, vocabulary: int, seed: int) -> Any:
    """A Llama with random weights in float32; the weights depend on `seed` alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.window,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def prepare(shape: Shape, state: Path, library: Path | None) -> tuple[Tokenizer, Material]:
    """Tokenizer (kept in `state`, so that a resumed run has the same one) and training text."""
    from tokenizers import Tokenizer

    texts, tests = documents("train", library=library), training_tests(library)
    kept = state / "tokenizer.json"
    if kept.is_file():
        tokenizer = Tokenizer.from_file(str(kept))
    else:
        template = "\n".join([passkey.INTRODUCTION, passkey.FILLER, passkey.KEY_SENTENCE, passkey.QUESTION])
        source = [d.text for d in texts] * LIBRARY_REPEATS + [d.text for d in tests] + [template] * TEMPLATE_REPEATS
        tokenizer = train_tokenizer(source, shape.vocabulary)
        write_text(kept, tokenizer.to_str() + "\n")
    return tokenizer, training_material(texts, tests, _encoder(tokenizer), tokenizer.get_vocab_size())


def write_model(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `model.safetensors` (bfloat16, the tied head once), `config.json` and the tokenizer."""
    import torch
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    data = save({name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}, {"format": "pt"})
    with atomic_output(folder / "model.safetensors", overwrite=True) as file:
        file.write(data)
    config = {**model.config.to_diff_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # where transformers 4 looks
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n", overwrite=True)
    write_tokenizer(tokenizer, folder, model.config.max_position_embeddings)


def train_demo_model(
    out: Path,
    state: Path,
    settings: Settings,
    shape: Shape,
    *,
    command: Sequence[str] = (),
    minutes: float | None = None,
    threads: int = 2,
    trials: int = 200,
    library: Path | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> None:
    """Train (or continue from `state`), write the model to `out`, measure it there and write its card."""
    import torch

    state.mkdir(parents=True, exist_ok=True)
    tokenizer, material = prepare(shape, state, library)
    settings = Settings(**{**asdict(settings), "data": _fingerprint(material, shape)})
    model = new_model(shape, tokenizer.get_vocab_size(), settings.seed)

    def rows(step: int) -> tuple[Tensor, Tensor]:
        ids, weights = batch(material, seed=settings.seed, step=step, rows=settings.rows, window=shape.window)
        return torch.from_numpy(ids), torch.from_numpy(weights)

    progress = train(model, rows, settings, state / "checkpoint.pt", minutes=minutes, threads=threads, report=report)
    write_model(model, tokenizer, out)
    measured = measure(out, trials=trials, library=library)
    run = Run(
        command=list(command),
        steps=progress.step,
        tokens=progress.step * settings.rows * shape.window,
        seconds=progress.seconds,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        window=shape.window,
        threads=threads,
    )
    record = json.dumps(held_out_record(measured, run, library), indent=1)
    write_text(out / "heldout.json", record + "\n", overwrite=True)
    write_text(out / "README.md", card(measured, run), overwrite=True)


def _encoder(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def _fingerprint(material: Material, shape: Shape) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(material.text).tobytes())
    digest.update(json.dumps([asdict(shape), material.names]).encode())
    return digest.hexdigest()


def progress_printer(settings: Settings, minutes: float | None, every: float = 10.0) -> Callable[[Progress], None]:
    """A reporter that prints a line on stderr every `every` seconds: step, loss, tokens a second, time left."""
    first: list[tuple[int, float]] = []
    last = [0.0]

    def report(progress: Progress) -> None:
        first[:] = first or [(progress.step, progress.seconds)]
        now = time.monotonic()
        done = progress.step == progress.total(settings.steps)
        if now - last[0] < every and not done:
            return
        last[0] = now
        rate = (progress.step - first[0][0]) / max(1e-9, progress.seconds - first[0][1])
        left = (progress.total(settings.steps) - progress.step) / rate / 60 if rate else float("nan")
        if minutes is not None and progress.decay_start is None:
            left = min(left, minutes - progress.seconds / 60)
        click.echo(
            f"step {progress.step:,}/{progress.total(settings.steps):,}  loss {progress.loss:.3f}  "
            f"{rate * settings.rows * Shape().window:,.0f} tokens/s  {left:.0f} min left",
            err=True,
        )

    return report


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for the model and its card."
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the checkpoint  [default: OUT.training]",
)
@click.option("--steps", type=click.IntRange(min=1), default=Settings.steps, help="Steps of 4,096 tokens, at most.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0.01),
    help="Wall time of all sittings; shortens the run, never lengthens it.",
)
@click.option("--threads", type=click.IntRange(min=1), default=2, help="Threads; the weights do not depend on it.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=Settings.seed, help="Decides the initial weights and the rows."
)
@click.option("--trials", type=click.IntRange(min=1), default=200, help="Passkey prompts for the card.")
@click.option(
    "--library",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Another Python's standard library.",
)
def main(
    out: Path,
    state: Path | None,
    steps: int,
    minutes: float | None,
    threads: int,
    seed: int,
    trials: int,
    library: Path | None,
) -> None:
    """Train the demo model on the standard library of the running Python.

    \b
    Examples:
      python -m longrope_export.training.demo_model --out demo
      python -m longrope_export.training.demo_model --out demo --minutes 20

    Give the same command again to continue an interrupted run.
    """
    keep_freed_memory()
    settings = Settings(steps=steps, seed=seed)
    command = ["python", "-m", "longrope_export.training.demo_model", *sys.argv[1:]]
    try:
        train_demo_model(
            out,
            state or out.with_name(out.name + ".training"),
            settings,
            Shape(),
            command=command,
            minutes=minutes,
            threads=threads,
            trials=trials,
            library=library,
            report=progress_printer(settings, minutes),
        )
    except LongRopeError as error:
        raise click.ClickException(str(error)) from None
    click.echo(str(out))


if __name__ == "__main__":
    main()
