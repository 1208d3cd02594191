"""The parity matrix: every family in every runtime that can hold it, against the reference loader; docs/verify.md's table.

python benchmarks/parity_matrix.py [--model GGUF_OR_FOLDER]… [--blocks N] [--only WORD] [--write]

Each family of `FAMILIES` is a random model of two layers, in F32: as a model folder in transformers' own class, and as a
GGUF of every architecture that the converter has for it in llama.cpp, both with one record (window 256 of 1,024; long and
short factors that differ; attention factor 1.1). The reference has the weights of the source folder. Every comparison is
made again with wrong records (`hypotheses.MUTANTS`), which all have to fail. --model adds a real model in the same forms,
of a GGUF file its first blocks (2, or --blocks).
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.converters.card import markdown_table
from longrope_export.converters.export import export_model
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.targets import STAND_INS, TARGETS
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.converters.hypotheses import MUTANTS, expressible, set_of
from longrope_export.converters.lossy import hf_losses, one_set_record
from longrope_export.converters.measuring import (
    Measured,
    Options,
    RegimeResult,
    distance_to,
    measure_folder,
    measure_gguf,
)
from longrope_export.converters.prefix_plan import Limits
from longrope_export.converters.probe import write_probe
from longrope_export.description import describe
from longrope_export.families import FAMILIES
from longrope_export.scaling import RopeScaling
from longrope_export.tolerances import DISCRIMINATION
from longrope_export.versions import versions

WINDOW, EXTENDED = 256, 1024
PAGE = Path(__file__).resolve().parent.parent / "docs" / "verify.md"
BEGIN, END = "<!-- parity matrix -->", "<!-- /parity matrix -->"
COLUMNS = ("model", "runtime", "set", "distance", "largest", "same first token", "nearest wrong record", "verdict")

SIZES: dict[str, Any] = {
    "vocab_size": 259, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": WINDOW, "initializer_range": 0.25,
    "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": None,
}  # fmt: skip
# what makes a family differ from a Llama, where its configuration leaves a choice
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "phi3": {"partial_rotary_factor": 0.75, "pad_token_id": 0, "original_max_position_embeddings": WINDOW, "resid_pdrop": 0.0},
    "granite": {
        "attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 2.0,
        "attention_bias": True, "tie_word_embeddings": True,
    },
    "gemma2": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    "gemma3": {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One comparison: what was compared, the verdict, and how far in nats the runtime is from the wrong records."""

    model: str
    runtime: str
    result: RegimeResult
    mutants: dict[str, float]

    @property
    def passes(self) -> bool:
        """Whether the right record passes and the runtime is far from every wrong one."""
        far = DISCRIMINATION * self.result.judgement.bound
        return self.result.judgement.verdict == "pass" and bool(self.mutants) and min(self.mutants.values()) > far

    def cells(self) -> list[str]:
        """The table's row."""
        found = self.result.judgement
        nearest = min(self.mutants, key=self.mutants.__getitem__)
        return [
            self.model, self.runtime, self.result.regime, f"{found.distance:.1e}", f"{found.largest:.1e}",
            f"{found.top1:.0%}", f"{nearest} {self.mutants[nearest]:.2g}", "pass" if self.passes else "FAIL",
        ]  # fmt: skip


def record_for(model: Path, **changes: Any) -> RopeScaling:
    """The matrix's record for the model at `model`, of a window of 256 tokens."""
    found = describe(model)
    pairs = found.rotary_dim // 2
    values: dict[str, Any] = {
        "rope_theta": found.rope_theta, "rotary_dim": found.rotary_dim,
        "original_max_position_embeddings": WINDOW, "max_position_embeddings": EXTENDED,
        "long_factor": np.linspace(1.0, 4.0, pairs).tolist(), "short_factor": np.linspace(1.0, 1.3, pairs).tolist(),
        "long_attention_factor": 1.1, "short_attention_factor": 1.1,
    }  # fmt: skip
    return RopeScaling(**{**values, **changes})


def random_model(family: str, folder: Path, **changes: Any) -> Path:
    """Write a loud random model of the family, biases and norms included, with a byte-level tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    config = AutoConfig.for_model(FAMILIES[family].model_types[0], **{**SIZES, **OWN.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "_norm." in name:
            torch.nn.init.normal_(parameter, mean=float("_norm." in name and "gemma" not in family), std=0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> Any:
    """Byte-level BPE of 259 tokens with one merge: every text is its bytes, in transformers and in llama.cpp."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "ab"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def architectures(family: str) -> tuple[str, ...]:
    """GGUF architectures that hold the family with factors, its usual one first; none for a family without."""
    usual = (TARGETS[family][0].architecture,) if family in TARGETS else ()
    return (*usual, *STAND_INS.get(family, {}))


def compared(measured: Measured, model: str, runtime: str, scaling: RopeScaling) -> Iterator[Line]:
    """One line for each regime; the wrong records are compared with the very same numbers of the runtime."""
    for plan, table, result in zip(measured.plans, measured.tables, measured.judged(scaling), strict=True):
        wrong = {name: change(scaling) for name, change in MUTANTS.items()}
        distances = {
            name: distance_to(measured, plan, table, record)
            for name, record in wrong.items()
            if set_of(record, plan.regime) != set_of(scaling, plan.regime)
        }
        yield Line(model, runtime, result, distances)


def in_transformers(name: str, source: Path, work: Path, scaling: RopeScaling, options: Options) -> Iterator[Line]:
    """transformers' own class with the extended folder, on the part of the record that it can express."""
    write_hf_folder(source, work / "hf", scaling, allow_lossy=True)
    left_out = ", without n̂ and the short attention factor" if hf_losses(scaling) else ""
    measured = measure_folder(work / "hf", scaling, options)
    yield from compared(measured, name, f"transformers{left_out}", expressible(scaling))


def in_llamacpp(
    name: str, source: Path, work: Path, scaling: RopeScaling, options: Options, architecture: str
) -> Iterator[Line]:
    """llama.cpp with the model converted to `architecture`, against the source's weights."""
    path = work / f"{architecture}.gguf"
    # what a real model loses is its own, longer window
    convert_to_gguf(source, path, scaling, dtype="f32", architecture=architecture, allow_lossy=True)
    measured = measure_gguf(path, scaling, options, source)
    assert measured is not None
    yield from compared(measured, name, f"llama.cpp, {architecture}", scaling)


def in_one_set(name: str, source: Path, work: Path, scaling: RopeScaling, options: Options) -> Iterator[Line]:
    """llama.cpp with the long factors as `rope_freqs.weight`, which hold at every length."""
    path, written = work / "static.gguf", one_set_record(scaling)
    convert_to_gguf(source, path, scaling, dtype="f32", static=True, allow_lossy=True)
    measured = measure_gguf(path, written, options, source)
    assert measured is not None
    yield from compared(measured, name, "llama.cpp, llama, one set", written)


def family_lines(family: str, work: Path, options: Options) -> Iterator[Line]:
    """Every runtime of one family on its random model."""
    source = random_model(family, work / "source")
    scaling = record_for(source)
    yield from in_transformers(f"{family}, random", source, work, scaling, options)
    for architecture in architectures(family):
        yield from in_llamacpp(f"{family}, random", source, work, scaling, options, architecture)
    if family == "qwen2":
        yield from in_one_set(f"{family}, random", source, work, scaling, options)


def partial_lines(work: Path, options: Options) -> Iterator[Line]:
    """A record that stock transformers cannot express whole: start tokens, and two attention factors."""
    source = random_model("llama", work / "source")
    scaling = record_for(source, long_start_tokens=32, short_start_tokens=8, short_attention_factor=1.0)
    yield from in_transformers("llama, random", source, work, scaling, options)


def real_lines(model: Path, work: Path, options: Options, blocks: int) -> Iterator[Line]:
    """The same comparisons on a real llama, mistral, qwen2, … whose window is taken for 256 tokens."""
    source, part = model, ""
    if model.is_file():
        source, part = work / "source", f", {blocks} blocks"
        write_probe(model, work / "probe.gguf", blocks=blocks)
        export_model(work / "probe.gguf", source, _plain(model), dtype="f32", gguf=False)
    scaling, found = record_for(source), describe(source)
    assert found.family is not None
    name = f"{found.family.name}, {model.stem}{part}"
    yield from in_transformers(name, source, work, scaling, options)
    for architecture in architectures(found.family.name):
        yield from in_llamacpp(name, source, work, scaling, options, architecture)


def _plain(model: Path) -> RopeScaling:
    """A record that changes nothing: the folder is only a place to take weights from."""
    window, ones = describe(model).window, (1.0,) * (describe(model).rotary_dim // 2)
    return record_for(
        model, original_max_position_embeddings=window, max_position_embeddings=2 * window,
        long_factor=ones, short_factor=ones, long_attention_factor=1.0, short_attention_factor=1.0,
    )  # fmt: skip


def matrix(options: Options, models: Sequence[Path] = (), only: str = "", blocks: int = 2) -> Iterator[Line]:
    """All lines, family by family; `only`: families whose name holds the word."""
    for family in FAMILIES:
        if only in family:
            with tempfile.TemporaryDirectory() as folder:
                yield from family_lines(family, Path(folder), options)
    if only in "llama":
        with tempfile.TemporaryDirectory() as folder:
            yield from partial_lines(Path(folder), options)
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            yield from real_lines(model, Path(folder), options, blocks)


def homeless() -> list[str]:
    """Families for which no GGUF architecture with factors exists."""
    return [family for family in FAMILIES if not architectures(family)]


def write_table(table: str) -> None:
    """Put the table between its marks in docs/verify.md."""
    text = PAGE.read_text()
    block = f"{BEGIN}\n{table}\n{END}"
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda match: block, text, flags=re.DOTALL))


def main() -> None:
    """Print the table, exit 1 unless every line passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a real model")
    parser.add_argument("--blocks", type=int, default=2, help="how many blocks of a GGUF")
    parser.add_argument("--only", default="", help="families whose name holds this word")
    parser.add_argument("--prefixes", type=int, default=16)
    parser.add_argument("--write", action="store_true", help="write docs/verify.md")
    arguments = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.disable(logging.WARNING)  # transformers warns about short_mscale and long_mscale
    lines = []
    for line in matrix(Options(Limits(arguments.prefixes)), arguments.model, arguments.only, arguments.blocks):
        lines.append(line)
        print(" | ".join(line.cells()), flush=True)
    used = ", ".join(f"{name} {number}" for name, number in versions().items())
    without = ", ".join(homeless())
    table = (
        f"{markdown_table([COLUMNS, *(line.cells() for line in lines)])}\n\nDistances in nats; {used}. Not in llama.cpp: "
        f"{without}, for which no architecture with factors computes the same."
    )
    print(f"\n{table}")
    if arguments.write:
        write_table(table)
    raise SystemExit(not all(line.passes for line in lines))


if __name__ == "__main__":
    main()
