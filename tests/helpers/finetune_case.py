"""A tiny model folder with a tokenizer, a record and texts to fine-tune on, and a look at what reaches the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.scaling import RopeScaling
from longrope_export.training.config import FinetuneConfig

WINDOW, TARGET = 32, 128
LETTERS = [chr(code) for code in range(32, 32 + 94)]
LONG_FACTOR = tuple(float(value) for value in np.linspace(1.0, 4.0, 16).astype(np.float32))
SHORT_FACTOR = tuple(float(value) for value in np.linspace(1.0, 1.2, 16).astype(np.float32))


@dataclass(frozen=True)
class Case:
    """Folders of one tiny world; `cache` keeps its tokens."""

    model: Path
    record: Path
    texts: Path
    cache: Path

    def config(self, out: Path, **changes: Any) -> FinetuneConfig:
        """Four steps of four rows on the case; everything can be changed."""
        values: dict[str, Any] = {
            "model": self.model, "scaling": self.record, "data": (self.texts,), "out": out, "cache": self.cache,
            "steps": 4, "batch": 4, "micro_batch": 2, "warmup": 2, "learning_rate": 1e-3, "save_every": 2,
            "eval_every": 2, "threads": 1,
        }  # fmt: skip
        return FinetuneConfig(**{**values, **changes})


def record(**changes: Any) -> RopeScaling:
    """Factors for the tiny model, 32 → 128 tokens, different for short and long."""
    values: dict[str, Any] = {
        "rope_theta": 10000.0, "rotary_dim": 32, "original_max_position_embeddings": WINDOW,
        "max_position_embeddings": TARGET, "long_factor": LONG_FACTOR, "short_factor": SHORT_FACTOR,
        "long_attention_factor": 1.25,
    }  # fmt: skip
    return RopeScaling(**{**values, **changes})


def write_case(folder: Path, tiny_llama: Path) -> Case:
    """The world in `folder`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(tiny_llama, folder / "model")
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=WINDOW
    ).save_pretrained(folder / "model")
    (folder / "longrope.json").write_text(record().to_json())
    write_texts(folder / "texts", 0)
    return Case(folder / "model", folder / "longrope.json", folder / "texts", folder / "cache")


def write_texts(folder: Path, seed: int, *, long: int = 32, short: int = 96) -> Path:
    """`long` texts of 150 to 400 characters and `short` ones of up to 24, of letters in a rising order, as JSONL."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(long + short):
        low, high = (150, 400) if number < long else (8, 24)
        start, size = int(generator.integers(0, 26)), int(generator.integers(low, high))
        text = "".join(chr(97 + (start + step * step) % 26) for step in range(size))
        lines.append(json.dumps({"text": f"{number:03} {text}"}) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines))
    return folder


@dataclass
class Seen:
    """What reached the model, forward by forward, while it was training."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    cos: list[Any] = field(default_factory=list)
    sin: list[Any] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    layer_calls: int = 0
    layer_dtypes: set[Any] = field(default_factory=set)
    attention: set[str] = field(default_factory=set)


@dataclass
class Session:
    """A run's parts before it begins, and what was seen of it."""

    inputs: Any
    corpus: Any
    trained: Any
    trainer: Any
    seen: Seen


@contextmanager
def session(config: FinetuneConfig) -> Iterator[Session]:
    """The parts that `run` builds, with hooks on the model; nothing is trained yet."""
    from transformers import TrainerCallback

    from longrope_export.rotary import core_of, decoder_of
    from longrope_export.training.arguments import training_arguments
    from longrope_export.training.checkpoints import Checkpoints
    from longrope_export.training.corpus import read_corpus
    from longrope_export.training.inputs import check_inputs
    from longrope_export.training.model import TrainedModel

    inputs = check_inputs(config)
    arguments = training_arguments(config)
    arguments.save_strategy = "no"
    corpus = read_corpus(config, inputs, config.out, lambda done, everything, status: None)
    trained = TrainedModel.load(config, inputs)
    seen, core = Seen(), core_of(trained.model)
    decoder: Any = decoder_of(core)

    def entering(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            seen.inputs.append(dict(kwargs))
            seen.attention.add(core.config._attn_implementation)

    def rotated(module: Any, args: Any, output: Any) -> None:
        if core.training:
            seen.cos.append(output[0])
            seen.sin.append(output[1])

    def into_layer(module: Any, args: Any) -> None:
        if core.training:
            seen.layer_calls += 1

    def out_of_layer(module: Any, args: Any, output: Any) -> None:
        if core.training:
            seen.layer_dtypes.add(output.dtype)

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            seen.rates.append(more["optimizer"].param_groups[0]["lr"])
            squares = [(each.grad.double() ** 2).sum().item() for each in core.parameters() if each.grad is not None]
            seen.norms.append(sum(squares) ** 0.5)

    with ExitStack() as active:
        active.enter_context(trained.training())
        core.register_forward_pre_hook(entering, with_kwargs=True)
        decoder.rotary_emb.register_forward_hook(rotated)
        # Recomputation ends before the layer's output: it is the input that comes twice.
        decoder.layers[0].mlp.register_forward_pre_hook(into_layer)
        decoder.layers[0].mlp.register_forward_hook(out_of_layer)
        trainer = trained.trainer(corpus, arguments, Checkpoints(config.out / "checkpoints", {}), [Watch()])
        yield Session(inputs, corpus, trained, trainer, seen)
