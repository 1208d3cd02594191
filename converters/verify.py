"""`verify`: run written files in transformers and in llama.cpp and compare them with the reference loader."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longrope_export.converters.discrimination import Verdict
from longrope_export.converters.hypotheses import Regime, expressible
from longrope_export.converters.lossy import hf_losses
from longrope_export.converters.measuring import Options, RegimeResult, measure_folder, measure_gguf
from longrope_export.converters.prefix_plan import REGIMES, Limits, plan_gguf
from longrope_export.errors import InputFileError, LongRopeError
from longrope_export.formats.records import CONFIG_FILE, read_scaling
from longrope_export.scaling import RopeScaling
from longrope_export.versions import versions


@dataclass(frozen=True)
class VerificationReport:
    """Verdict over all files, runtimes and regimes; it is "pass" only if every single one is.

    `left_out` says what of the record transformers' own classes cannot express: their verdict is about the rest.
    """

    path: str
    verdict: Verdict
    regimes: tuple[RegimeResult, ...]
    notes: tuple[str, ...]
    probe: bool
    versions: dict[str, str]
    seconds: float
    left_out: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        values = {name: getattr(self, name) for name in ("path", "verdict", "probe", "versions", "seconds")}
        lists = {name: list(getattr(self, name)) for name in ("notes", "left_out")}
        return {**values, **lists, "regimes": [entry.to_dict() for entry in self.regimes]}


def verify(
    path: str | os.PathLike[str],
    scaling: RopeScaling | None = None,
    *,
    source: str | os.PathLike[str] | None = None,
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
    carry. `source` is the model folder that a GGUF was made from: the reference then has its weights instead of the
    file's. `bound` in nats replaces the tolerance of the weights' types. `probe` compares the first two blocks only.

    Raises `InputFileError` when there is nothing to verify or no record, `RuntimeFailure` when llama.cpp crashes or
    refuses a file, `UnsupportedModelError` when only a `source` could be the reference, `MissingDependencyError`.
    """
    begin = time.monotonic()
    place = Path(path)
    if source is not None and probe:
        raise LongRopeError("a probe is cut out of the file itself: leave out the source, or the probe")
    options = Options(Limits(prefixes, max_prefix, regimes), seed, bound, probe, text, threads)
    results: list[RegimeResult] = []
    notes: list[str] = []
    left_out: list[str] = []
    for file in _targets(place):
        record = scaling or read_scaling(file)
        if file.is_dir():
            found, remarks = _verify_folder(file, record, options)
            left_out += hf_losses(record)
        else:
            found, remarks = _verify_gguf(file, record, options, Path(source) if source is not None else None)
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
        left_out=tuple(dict.fromkeys(left_out)),
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


def _verify_gguf(
    file: Path, scaling: RopeScaling, options: Options, source: Path | None
) -> tuple[list[RegimeResult], list[str]]:
    measured = measure_gguf(file, scaling, options, source)
    if measured is None:
        return [], plan_gguf(scaling, options.limits)[1]
    return measured.judged(scaling), [*measured.notes, *_inexpressible(scaling)]


def _verify_folder(folder: Path, scaling: RopeScaling, options: Options) -> tuple[list[RegimeResult], list[str]]:
    """What transformers' classes cannot express is in the folder for the reference loader, and left out here."""
    measured = measure_folder(folder, scaling, options)
    return measured.judged(expressible(scaling)), list(measured.notes)


def _inexpressible(scaling: RopeScaling) -> list[str]:
    notes = []
    if scaling.long_start_tokens or scaling.short_start_tokens:
        notes.append("the record keeps the first positions un-interpolated, which llama.cpp does not do")
    if scaling.long_attention_factor != scaling.short_attention_factor:
        notes.append("the record has two attention factors; llama.cpp applies one in both regimes")
    return notes
