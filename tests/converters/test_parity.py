"""The parity matrix: every family in every runtime that holds it, on tiny random models, with wrong records rejected."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_gguf import change, renamed
from click.testing import CliRunner

from longrope_export.cli.main import cli
from longrope_export.cli.verify import print_report
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.targets import STAND_INS, TARGETS
from longrope_export.converters.hypotheses import MUTANTS
from longrope_export.converters.measuring import Options, measure_gguf
from longrope_export.converters.prefix_plan import Limits
from longrope_export.converters.verify import verify
from longrope_export.errors import InputFileError, LongRopeError, UnsupportedModelError
from longrope_export.families import FAMILIES
from longrope_export.runtimes import llamacpp

pytestmark = pytest.mark.usefixtures("quiet")
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PAGE = BENCHMARKS.parent / "docs" / "verify.md"
OPTIONS = Options(Limits(3, max_prefix=264))
WITHOUT_GGUF = {"gemma2", "gemma3"}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def check(lines: Any, runtimes: list[str]) -> None:
    """Each runtime in both regimes, near to the reference, far from all four wrong records."""
    found = list(lines)
    assert [(line.runtime, line.result.regime) for line in found] == [
        (runtime, regime) for runtime in runtimes for regime in ("short", "long")
    ]
    for line in found:
        judgement = line.result.judgement
        assert line.passes, line.cells()
        assert (judgement.bound, judgement.top1) == (1e-3, 1.0)
        assert max(judgement.distance, judgement.largest) < 1e-3
        assert set(line.mutants) == set(MUTANTS) == {"dropped", "halved", "shuffled", "swapped"}
        assert min(line.mutants.values()) > 0.03


def test_the_matrix_has_every_family_and_every_architecture() -> None:
    from parity_matrix import architectures, homeless

    assert set(homeless()) == WITHOUT_GGUF
    for family in FAMILIES:
        assert set(architectures(family)) == {
            *([TARGETS[family][0].architecture] if family in TARGETS else []), *STAND_INS.get(family, {})
        }  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_transformers_and_in_its_first_architecture(family: str, tmp_path: Path) -> None:
    from parity_matrix import architectures, in_llamacpp, in_transformers, random_model, record_for

    source = random_model(family, tmp_path / "source")
    scaling, first = record_for(source), architectures(family)[:1]
    check(in_transformers(family, source, tmp_path, scaling, OPTIONS), ["transformers"])
    for architecture in first:
        check(in_llamacpp(family, source, tmp_path, scaling, OPTIONS, architecture), [f"llama.cpp, {architecture}"])
    assert bool(first) == (family not in WITHOUT_GGUF)


def test_the_documentation_s_table_has_every_line_and_no_failure() -> None:
    from parity_matrix import BEGIN, COLUMNS, END, architectures

    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line.startswith("|")
    ]
    assert tuple(rows[0]) == COLUMNS
    assert {row[-1] for row in rows[2:]} == {"pass"}
    found = {tuple(row[:3]) for row in rows[2:]}
    for family in FAMILIES:
        for runtime in ("transformers", *(f"llama.cpp, {name}" for name in architectures(family))):
            assert {(f"{family}, random", runtime, regime) for regime in ("short", "long")} <= found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_matrix(family: str, tmp_path: Path) -> None:
    from parity_matrix import architectures, family_lines

    runtimes = ["transformers", *(f"llama.cpp, {name}" for name in architectures(family))]
    lines = list(family_lines(family, tmp_path, Options(Limits(16))))
    check((line for line in lines if not line.runtime.endswith("one set")), runtimes)
    assert all(line.passes for line in lines)


def test_what_transformers_cannot_express_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from parity_matrix import partial_lines, random_model, record_for

    check(partial_lines(tmp_path, OPTIONS), ["transformers, without n̂ and the short attention factor"])
    report = verify(tmp_path / "hf", prefixes=2, max_prefix=264)
    assert report.verdict == "pass"
    assert len(report.left_out) == 2
    assert "first 32 positions" in report.left_out[0]
    assert "not 1" in report.left_out[1]
    assert report.to_dict()["left_out"] == list(report.left_out)
    print_report(report)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("PASS, without what stands below: ")
    assert "left out of the comparison: transformers will rescale the first 32 positions too" in shown
    # the part that is compared still has to be right
    wrong = record_for(random_model("llama", tmp_path / "again"), long_start_tokens=32, long_factor=[2.0] * 8)
    assert verify(tmp_path / "hf", wrong, prefixes=2, max_prefix=264).verdict == "fail"


def test_a_line_passes_only_with_a_far_mutant(tmp_path: Path) -> None:
    from dataclasses import replace

    from parity_matrix import in_transformers, random_model, record_for

    source = random_model("llama", tmp_path / "source")
    line = next(in_transformers("llama", source, tmp_path, record_for(source), OPTIONS))
    assert line.passes
    assert not replace(line, mutants={}).passes
    assert not replace(line, mutants={**line.mutants, "near": 4e-3}).passes
    wrong = replace(line.result.judgement, verdict="fail")
    assert not replace(line, result=replace(line.result, judgement=wrong)).passes
    assert line.cells()[-1] == "pass"


# --- stand-ins against the folder they were made from --------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Builder of (source folder, GGUF in another architecture, record) of a family."""
    import sys

    sys.path.insert(0, str(BENCHMARKS))
    from parity_matrix import random_model, record_for

    sys.path.remove(str(BENCHMARKS))

    @functools.cache
    def build(family: str, architecture: str, dtype: str = "f32") -> Any:
        work = tmp_path_factory.mktemp("stand-in")
        source = random_model(family, work / "source")
        convert_to_gguf(source, work / "m.gguf", record_for(source), dtype=dtype, architecture=architecture)
        return source, work / "m.gguf", record_for(source)

    return build


@pytest.mark.parametrize(("family", "architecture"), [("qwen2", "phi3"), ("qwen3", "step35")])
def test_a_stand_in_is_verified_against_its_source(stand_in: Any, family: str, architecture: str) -> None:
    source, path, scaling = stand_in(family, architecture)
    with pytest.raises(UnsupportedModelError, match=r"\(--source\)"):
        verify(path, prefixes=2, regimes=("long",))
    measured = measure_gguf(path, scaling, OPTIONS, source)
    assert measured is not None
    assert {entry.judgement.verdict for entry in measured.judged(scaling)} == {"pass"}
    for wrong in MUTANTS.values():
        assert [entry.judgement.verdict for entry in measured.judged(wrong(scaling))] == ["fail", "fail"]


def test_a_source_in_bfloat16_is_computed_in_float32(tmp_path: Path) -> None:
    import torch
    from parity_matrix import random_model, record_for
    from transformers import AutoModelForCausalLM

    source = random_model("llama", tmp_path / "source")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    convert_to_gguf(source, tmp_path / "m.gguf", record_for(source), dtype="f32")
    report = verify(tmp_path / "m.gguf", source=source, prefixes=2, regimes=("long",))
    assert (report.verdict, report.regimes[0].judgement.distance < 1e-4) == ("pass", True)


def test_the_source_is_what_a_file_is_compared_with(stand_in: Any) -> None:
    source, path, _ = stand_in("llama", "llama")
    other, quantised, _ = stand_in("llama", "llama", "q8_0")
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert verify(path, source=source, prefixes=2, regimes=("long",)).verdict == "pass"
    told = CliRunner().invoke(
        cli, ["verify", str(path), "--source", str(other), "--prefixes", "2", "--max-prefix", "264"]
    )
    assert told.exit_code == 1
    assert "FAIL" in told.output
    with pytest.raises(InputFileError, match="holds Q8_0 weights, which are not the source's"):
        verify(quantised, source=other, prefixes=2)
    with pytest.raises(LongRopeError, match="leave out the source, or the probe"):
        verify(path, source=source, probe=True)


@pytest.mark.parametrize(
    ("architecture", "keys"),
    [
        ("minicpm", {"embedding_scale": 1.0, "residual_scale": 1.0, "logit_scale": 1.0}),
        pytest.param("mistral3", {}, marks=pytest.mark.slow),
        pytest.param("deci", {}, marks=pytest.mark.slow),
    ],
)
def test_a_llama_under_another_name_gets_its_factors_too(
    stand_in: Any, tmp_path: Path, architecture: str, keys: dict[str, float]
) -> None:
    """What docs/families.md says of architectures that the converter does not write."""
    _, path, scaling = stand_in("llama", "llama")
    copy = tmp_path / "m.gguf"
    copy.write_bytes(path.read_bytes())
    ids = [(7 * index * index + 3) % 250 + 2 for index in range(300)]

    def computed(file: Path) -> Any:
        return llamacpp.next_token_probabilities(file, [ids], context=512)[0]

    right = computed(path)
    assert np.abs(computed(renamed(copy, architecture, **keys)) - right).max() < 1e-3
    change(copy, vectors={"rope_factors_long.weight": (1.0,) * len(scaling.long_factor)})
    assert np.abs(computed(copy) - right).max() > 0.03
