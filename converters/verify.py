"""`verify`: run written files in transformers and in llama.cpp and compare them with the reference loader."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longrope_export.converters.discrimination import Array, Judgement, Verdict, judge
from longrope_export.converters.hypotheses import Regime, alternatives, mistakes
from longrope_export.converters.prefix_plan import REGIMES, Limits, Plan, plan_folder, plan_gguf
from longrope_export.converters.probe import BLOCKS, write_probe
from longrope_export.converters.prompts import prompt_ids, random_ids
from longrope_export.errors import InputFileError, RuntimeFailure
from longrope_export.formats.ggml_types import type_name
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.records import CONFIG_FILE, read_scaling
from longrope_export.runtimes import llamacpp
from longrope_export.scaling import RopeScaling
from longrope_export.tolerances import FLOAT32, Tolerance, for_ggml_types
from longrope_export.versions import versions


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
class VerificationReport:
    """Verdict over all files, runtimes and regimes; it is "pass" only if every single one is."""

    path: str
    verdict: Verdict
    regimes: tuple[RegimeResult, ...]
    notes: tuple[str, ...]
    probe: bool
    versions: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        values = {name: getattr(self, name) for name in ("path", "verdict", "probe", "versions", "seconds")}
        return {**values, "notes": list(self.notes), "regimes": [entry.to_dict() for entry in self.regimes]}


@dataclass(frozen=True)
class Options:
    """How a verification runs; see `verify`."""

    limits: Limits
    seed: int = 0
    bound: float | None = None
    probe: bool = False
    text: str | None = None
    threads: int | None = None


def verify(
    path: str | os.PathLike[str],
    scaling: RopeScaling | None = None,
    *,
    prefixes: int = 16,
    seed: int = 0,
    bound: float | None = None,
    probe: bool = False,
    text: str | None = None,
    max_prefix: int | None = None,
    threads: int | None = None,
    regimes: tuple[Regime, ...] = REGIMES,
) -> VerificationReport:
    """Compare a GGUF file, or every model in a folder, with the reference loader under `scaling`.

    GGUF files run in llama.cpp, HF folders in transformers' own class. In each regime next-token probabilities are
    taken at `prefixes` lengths on one side of the window (the long regime adds a quarter more below it) of at most
    `max_prefix` tokens, of `text` or of source code chosen by `seed`. `scaling` None takes the record that the files
    carry. `bound` in nats replaces the tolerance of the weights' types. `probe` compares the first two blocks only.

    Raises `InputFileError` when there is nothing to verify or no record, `RuntimeFailure` when llama.cpp crashes or
    refuses a file, `MissingDependencyError`.
    """
    begin = time.monotonic()
    place = Path(path)
    options = Options(Limits(prefixes, max_prefix, regimes), seed, bound, probe, text, threads)
    results: list[RegimeResult] = []
    notes: list[str] = []
    for file in _targets(place):
        record = scaling or read_scaling(file)
        check = _verify_folder if file.is_dir() else _verify_gguf
        found, remarks = check(file, record, options)
        results += found
        notes += remarks
    return VerificationReport(
        path=str(place),
        verdict=_overall(results),
        regimes=tuple(results),
        notes=tuple(dict.fromkeys(notes)),
        probe=probe,
        versions=versions(),
        seconds=round(time.monotonic() - begin, 1),
    )


def _targets(place: Path) -> list[Path]:
    """The folder itself when it holds an HF model, and the GGUF files in it."""
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise InputFileError(f"{place} does not exist; name a GGUF file or a model folder")
    found = [place] if (place / CONFIG_FILE).is_file() else []
    found += sorted(place.glob("*.gguf"))
    if not found:
        raise InputFileError(f"{place} holds no {CONFIG_FILE} and no .gguf file; there is nothing to verify")
    return found


def _overall(results: list[RegimeResult]) -> Verdict:
    verdicts = {result.judgement.verdict for result in results}
    if "fail" in verdicts:
        return "fail"
    return "pass" if verdicts == {"pass"} else "cannot tell"


def _verify_gguf(file: Path, scaling: RopeScaling, options: Options) -> tuple[list[RegimeResult], list[str]]:
    from longrope_export.loader import load

    llamacpp.version()
    plans, notes = plan_gguf(scaling, options.limits)
    if not plans:
        return [], notes
    with tempfile.TemporaryDirectory(prefix="longrope-verify-") as folder:
        subject = file
        if options.probe:
            subject = Path(folder) / "probe.gguf"
            write_probe(file, subject)
        ids = gguf_prompt(subject, plans, options)
        tables = [run_llamacpp(subject, plan, ids, options) for plan in plans]
        model = load(subject, scaling, switch="long", angles="float32")
    tolerance = _tolerance(gguf_tolerance(file, BLOCKS if options.probe else None), options)
    name = _name(file, options)
    results = [
        judge_regime(name, "llama.cpp", plan, table, model, scaling, ids, tolerance)
        for plan, table in zip(plans, tables, strict=True)
    ]
    return results, notes + _inexpressible(scaling)


def _verify_folder(folder: Path, scaling: RopeScaling, options: Options) -> tuple[list[RegimeResult], list[str]]:
    plans, notes = plan_folder(scaling, options.limits)
    model = _stock_model(folder, options.probe)
    ids = _folder_prompt(folder, model.config.get_text_config().vocab_size, plans, options)
    tables = [log_probabilities(model, ids, plan.prefixes) for plan in plans]
    tolerance = _tolerance(FLOAT32, options)
    name = _name(folder, options)
    results = [
        judge_regime(name, "transformers", plan, table, model, scaling, ids, tolerance)
        for plan, table in zip(plans, tables, strict=True)
    ]
    return results, notes + _inexpressible(scaling)


def _name(file: Path, options: Options) -> str:
    return f"{file} (first {BLOCKS} blocks)" if options.probe else str(file)


def _tolerance(own: Tolerance, options: Options) -> Tolerance:
    return own if options.bound is None else replace(own, bound=options.bound)


def gguf_tolerance(file: Path, blocks: int | None = None) -> Tolerance:
    """The tolerance of a GGUF by the types of its matrices and its number of blocks, or the first `blocks` of them."""
    header = read_gguf_header(file)
    matrices = [info for info in header.tensors if len(info.shape) > 1]
    own = header.get(f"{header.get('general.architecture')}.block_count", 0)
    return for_ggml_types((type_name(info.ggml_type) for info in matrices), blocks or int(own))


def _inexpressible(scaling: RopeScaling) -> list[str]:
    notes = []
    if scaling.long_start_tokens or scaling.short_start_tokens:
        notes.append(
            "the record keeps the first positions un-interpolated, which llama.cpp and stock transformers do not do"
        )
    if scaling.long_attention_factor != scaling.short_attention_factor:
        notes.append("the record has two attention factors; llama.cpp and stock transformers apply one in both regimes")
    return notes


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


def reference(model: Any, scaling: RopeScaling, regime: Regime, ids: list[int], prefixes: tuple[int, ...]) -> Array:
    """Log-probabilities of the reference loader with the set of one regime, in transformers' float32 angles."""
    from longrope_export.loader import apply_scaling

    apply_scaling(model, scaling, switch=regime, angles="float32")
    return log_probabilities(model, ids, prefixes)


def judge_regime(
    file: str,
    runtime: str,
    plan: Plan,
    table: Array,
    model: Any,
    scaling: RopeScaling,
    ids: list[int],
    tolerance: Tolerance,
) -> RegimeResult:
    """Judge a runtime's log-probabilities; `model` is a transformers model whose rotary embedding is replaced."""

    def under(record: RopeScaling) -> Array:
        return reference(model, record, plan.regime, ids, plan.prefixes)

    truth = under(scaling)
    if table.shape != truth.shape:
        raise RuntimeFailure(f"{file}: {runtime} has {table.shape[1]} tokens, the reference {truth.shape[1]}")
    others = {name: under(record) for name, record in alternatives(scaling, plan.regime).items()}
    judgement = judge(table, truth, others, tolerance)
    suspects = _suspects(table, under, scaling, plan.regime, tolerance) if judgement.verdict == "fail" else ()
    window = scaling.original_max_position_embeddings
    return RegimeResult(
        file=file,
        runtime=runtime,
        regime=plan.regime,
        context=plan.context or None,
        prefixes=plan.prefixes,
        below=sum(length <= window for length in plan.prefixes),
        above=sum(length > window for length in plan.prefixes),
        judgement=judgement,
        suspects=suspects,
    )


def _suspects(
    table: Array, under: Callable[[RopeScaling], Array], scaling: RopeScaling, regime: Regime, tolerance: Tolerance
) -> tuple[str, ...]:
    """The mistakes that explain the runtime's probabilities within the tolerance."""
    return tuple(
        name
        for name, record in mistakes(scaling, regime).items()
        if judge(table, under(record), {}, tolerance).distance <= tolerance.bound
    )
