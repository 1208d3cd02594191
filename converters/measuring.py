"""What a runtime computes with a written file, and the transformers model that the reference is computed with."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.converters.discrimination import Array, Judgement, judge
from longrope_export.converters.hypotheses import Regime, alternatives, mistakes
from longrope_export.converters.prefix_plan import Limits, Plan, plan_folder, plan_gguf
from longrope_export.converters.probe import BLOCKS, write_probe
from longrope_export.converters.prompts import prompt_ids, random_ids
from longrope_export.errors import InputFileError, RuntimeFailure, UnsupportedModelError
from longrope_export.formats.ggml_types import type_name
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.runtimes import llamacpp
from longrope_export.scaling import RopeScaling
from longrope_export.tolerances import FLOAT32, Tolerance, for_ggml_types

# Matrices of these types hold the source's weights; others hold what quantisation made of them.
_UNQUANTISED = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Options:
    """How a verification runs; see `verify`."""

    limits: Limits
    seed: int = 0
    bound: float | None = None
    probe: bool = False
    text: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class RegimeResult:
    """What one runtime did with one file in one regime."""

    file: str
    runtime: str
    regime: Regime
    context: int | None
    prefixes: tuple[int, ...]
    below: int
    above: int
    judgement: Judgement
    suspects: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        values = {name: getattr(self, name) for name in ("file", "runtime", "regime", "context", "below", "above")}
        lists = {"prefixes": list(self.prefixes), "suspects": list(self.suspects)}
        return {**values, **lists, **self.judgement.to_dict()}


@dataclass(frozen=True)
class Measured:
    """A runtime's log-probabilities [prefixes, vocabulary] for each plan, and the model that the reference needs.

    `model` is a transformers model with the same weights, whose rotary embedding is replaced with every reference.
    """

    file: str
    runtime: str
    plans: tuple[Plan, ...]
    tables: tuple[Array, ...]
    model: Any
    ids: list[int]
    tolerance: Tolerance
    notes: tuple[str, ...] = ()

    def judged(self, scaling: RopeScaling) -> list[RegimeResult]:
        """The verdict on each regime if `scaling` is what the runtime should have applied."""
        return [judge_regime(self, plan, table, scaling) for plan, table in zip(self.plans, self.tables, strict=True)]

    def reference(self, scaling: RopeScaling, plan: Plan) -> Array:
        """Log-probabilities [prefixes, vocabulary] of the reference loader, in transformers' float32 angles."""
        from longrope_export.loader import apply_scaling

        apply_scaling(self.model, scaling, switch=plan.regime, angles="float32")
        return log_probabilities(self.model, self.ids, plan.prefixes)


def measure_gguf(file: Path, scaling: RopeScaling, options: Options, source: Path | None = None) -> Measured | None:
    """llama.cpp's probabilities with a GGUF file; `source` is the model folder to take the reference's weights from.

    None where llama.cpp never applies the record. Raises `InputFileError` for a quantised file with a `source`,
    `UnsupportedModelError` for one that transformers cannot read without, and as `llamacpp.run`.
    """
    from longrope_export.loader import load

    llamacpp.version()
    plans, notes = plan_gguf(scaling, options.limits)
    if not plans:
        return None
    if source is not None:
        _refuse_quantised(file)
    with tempfile.TemporaryDirectory(prefix="longrope-verify-") as folder:
        subject = file
        if options.probe:
            subject = Path(folder) / "probe.gguf"
            write_probe(file, subject)
        ids = gguf_prompt(subject, plans, options)
        tables = [run_llamacpp(subject, plan, ids, options) for plan in plans]
        try:
            model = load(source or subject, scaling, switch="long", angles="float32", dtype="float32")
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{error}; or name the model folder it was made from (--source)") from None
    own = gguf_tolerance(file, BLOCKS if options.probe else None)
    return Measured(
        name_of(file, options), "llama.cpp", tuple(plans), tuple(tables), model, ids, _tolerance(own, options),
        tuple(notes),
    )  # fmt: skip


def measure_folder(folder: Path, scaling: RopeScaling, options: Options) -> Measured:
    """The probabilities of transformers' own class with a model folder, in float32."""
    plans, notes = plan_folder(scaling, options.limits)
    model = _stock_model(folder, options.probe)
    ids = _folder_prompt(folder, model.config.get_text_config().vocab_size, plans, options)
    tables = [log_probabilities(model, ids, plan.prefixes) for plan in plans]
    return Measured(
        name_of(folder, options), "transformers", tuple(plans), tuple(tables), model, ids, _tolerance(FLOAT32, options),
        tuple(notes),
    )  # fmt: skip


def name_of(file: Path, options: Options) -> str:
    """The file's name in a report."""
    return f"{file} (first {BLOCKS} blocks)" if options.probe else str(file)


def _tolerance(own: Tolerance, options: Options) -> Tolerance:
    return own if options.bound is None else replace(own, bound=options.bound)


def _matrix_types(file: Path) -> list[str]:
    return [type_name(info.ggml_type) for info in read_gguf_header(file).tensors if len(info.shape) > 1]


def _refuse_quantised(file: Path) -> None:
    if quantised := next((name for name in _matrix_types(file) if name not in _UNQUANTISED), None):
        raise InputFileError(
            f"{file} holds {quantised} weights, which are not the source's: verify it without --source, or verify an F32 "
            "file of the same conversion with it"
        )


def gguf_tolerance(file: Path, blocks: int | None = None) -> Tolerance:
    """The tolerance of a GGUF by the types of its matrices and its number of blocks, or the first `blocks` of them."""
    header = read_gguf_header(file)
    own = header.get(f"{header.get('general.architecture')}.block_count", 0)
    return for_ggml_types(_matrix_types(file), blocks or int(own))


def _longest(plans: list[Plan]) -> int:
    return max(length for plan in plans for length in plan.prefixes)


def gguf_prompt(file: Path, plans: list[Plan], options: Options) -> list[int]:
    """Token ids for the longest prefix, by llama.cpp's own tokenizer."""

    def encode(text: str) -> list[int]:
        return llamacpp.tokenize(file, [text], add_special=True)[0]

    return prompt_ids(encode, _longest(plans), seed=options.seed, text=options.text)


def _folder_prompt(folder: Path, vocabulary: int, plans: list[Plan], options: Options) -> list[int]:
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        return random_ids(vocabulary, _longest(plans), seed=options.seed)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)

    def encode(text: str) -> list[int]:
        return [int(token) for token in tokenizer(text, verbose=False)["input_ids"]]

    return prompt_ids(encode, _longest(plans), seed=options.seed, text=options.text)


def run_llamacpp(file: Path, plan: Plan, ids: list[int], options: Options) -> Array:
    """llama.cpp's log-probabilities [prefixes, vocabulary] in the context of the plan."""
    # Growing prefixes of one text in one slot: the cache is F32 and keeps exactly what a fresh prefill computes.
    return llamacpp.next_token_probabilities(
        file,
        [ids[:length] for length in plan.prefixes],
        context=plan.context,
        threads=options.threads,
        reuse_prefix=True,
    )


def _stock_model(folder: Path, probe: bool) -> Any:
    """transformers' own class for the folder, in float32, with its first blocks only for a probe."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from longrope_export.checkpoint import open_checkpoint

    open_checkpoint(folder)
    safe = {"local_files_only": True, "trust_remote_code": False}
    config = AutoConfig.from_pretrained(str(folder), **safe)
    if probe:
        text = config.get_text_config()
        text.num_hidden_layers = min(BLOCKS, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:BLOCKS]
    return AutoModelForCausalLM.from_pretrained(
        str(folder), config=config, dtype="float32", use_safetensors=True, **safe
    ).eval()


def log_probabilities(model: Any, ids: list[int], prefixes: tuple[int, ...]) -> Array:
    """Log-probabilities [prefixes, vocabulary] after every prefix, from one forward over the longest."""
    import torch

    rows = torch.tensor(prefixes) - 1
    with torch.inference_mode():
        output = model(torch.tensor([ids[: max(prefixes)]]), use_cache=False, logits_to_keep=rows)
        values = torch.log_softmax(output.logits[0].double(), dim=-1).float().numpy()
    return np.asarray(values, dtype=np.float32)


def judge_regime(measured: Measured, plan: Plan, table: Array, scaling: RopeScaling) -> RegimeResult:
    """Judge one of a runtime's tables, and name the usual mistakes that explain a failure."""
    truth = measured.reference(scaling, plan)
    if table.shape != truth.shape:
        raise RuntimeFailure(
            f"{measured.file}: {measured.runtime} has {table.shape[1]} tokens, the reference {truth.shape[1]}"
        )
    others = {name: measured.reference(other, plan) for name, other in alternatives(scaling, plan.regime).items()}
    judgement = judge(table, truth, others, measured.tolerance)
    window = scaling.original_max_position_embeddings
    return RegimeResult(
        file=measured.file,
        runtime=measured.runtime,
        regime=plan.regime,
        context=plan.context or None,
        prefixes=plan.prefixes,
        below=sum(length <= window for length in plan.prefixes),
        above=sum(length > window for length in plan.prefixes),
        judgement=judgement,
        suspects=_suspects(measured, plan, table, scaling) if judgement.verdict == "fail" else (),
    )


def distance_to(measured: Measured, plan: Plan, table: Array, scaling: RopeScaling) -> float:
    """How far in nats the runtime is from the reference under `scaling`, whatever else it could be near to."""
    return judge(table, measured.reference(scaling, plan), {}, measured.tolerance).distance


def _suspects(measured: Measured, plan: Plan, table: Array, scaling: RopeScaling) -> tuple[str, ...]:
    """The mistakes that explain the runtime's probabilities within the tolerance."""
    return tuple(
        name
        for name, record in mistakes(scaling, plan.regime).items()
        if distance_to(measured, plan, table, record) <= measured.tolerance.bound
    )
