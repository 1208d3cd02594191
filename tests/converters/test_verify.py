"""The proof itself: right files pass, every mutant of the factors fails, in llama.cpp and in transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from longrope_export.cli.main import cli, main
from longrope_export.cli.verify import print_report
from longrope_export.converters import measuring
from longrope_export.converters.discrimination import judge
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.converters.hypotheses import MUTANTS as WRONG_FACTORS
from longrope_export.converters.hypotheses import all_ones, alternatives, swapped
from longrope_export.converters.prefix_plan import Limits, plan_folder, plan_gguf
from longrope_export.converters.probe import BLOCKS, write_probe
from longrope_export.converters.prompts import prompt_ids, random_ids, standard_library_text
from longrope_export.converters.verify import VerificationReport, verify
from longrope_export.errors import InputFileError, LongRopeError, RuntimeFailure, TextTooShortError
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_tensors import read_raw
from longrope_export.loader import load
from longrope_export.runtimes import llamacpp
from longrope_export.scaling import RopeScaling
from longrope_export.tolerances import EIGHT_BITS, FLOAT32, for_ggml_types

Writer = Callable[..., Path]


def make(pairs: int, theta: float, **changes: Any) -> RopeScaling:
    """A record with a window of 256, two different sets, and an attention factor."""
    values: dict[str, Any] = {
        "rope_theta": theta, "rotary_dim": 2 * pairs, "original_max_position_embeddings": 256,
        "max_position_embeddings": 1024, "long_factor": np.linspace(1.0, 4.0, pairs).tolist(),
        "short_factor": np.linspace(1.0, 1.3, pairs).tolist(),
        "long_attention_factor": 1.1, "short_attention_factor": 1.1,
    }  # fmt: skip
    return RopeScaling(**{**values, **changes})


def attention(scaling: RopeScaling, value: float) -> RopeScaling:
    return replace(scaling, long_attention_factor=value, short_attention_factor=value)


MUTANTS: dict[str, Callable[[RopeScaling], RopeScaling]] = {
    **WRONG_FACTORS,
    "attention squared": lambda scaling: attention(scaling, scaling.long_attention_factor**2),
    "attention dropped": lambda scaling: attention(scaling, 1.0),
}
RECORD = make(16, 10000.0)


@pytest.fixture(scope="module")
def plain(write_random_gguf: Writer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("verify")
    return {kind: write_random_gguf(folder / f"{kind}.gguf", kind=kind) for kind in ("F32", "Q8_0")}


@pytest.fixture(scope="module")
def good(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.gguf"
    patch_gguf(plain["F32"], path, RECORD)
    return path


class Bench:
    """One file's reference, loaded once, and llama.cpp's output on patched copies of that file."""

    def __init__(self, source: Path, folder: Path, scaling: RopeScaling, prefixes: int) -> None:
        self.source, self.folder, self.scaling = source, folder, scaling
        self.options = measuring.Options(Limits(prefixes, max_prefix=290))
        self.plans, _ = plan_gguf(scaling, self.options.limits)
        self.ids = measuring.gguf_prompt(source, self.plans, self.options)
        self.model = load(source, scaling, switch="long", angles="float32")
        self.tolerance = measuring.gguf_tolerance(source)

    def check(self, written: RopeScaling, regime: str = "long") -> measuring.RegimeResult:
        path = self.folder / f"{len(list(self.folder.iterdir()))}.gguf"
        patch_gguf(self.source, path, written, allow_lossy=True)
        plan = next(plan for plan in self.plans if plan.regime == regime)
        table = measuring.run_llamacpp(path, plan, self.ids, self.options)
        whole = measuring.Measured(path.name, "llama.cpp", (plan,), (table,), self.model, self.ids, self.tolerance)
        return whole.judged(self.scaling)[0]


# --- llama.cpp, F32 ---------------------------------------------------------------------------------------------


def test_a_right_gguf_passes_in_both_regimes(good: Path) -> None:
    report = verify(good)
    assert report.verdict == "pass"
    short, long = report.regimes
    assert (short.regime, short.context, short.below, short.above) == ("short", 256, 16, 0)
    assert (long.regime, long.context, long.below, long.above) == ("long", 512, 4, 16)
    assert max(short.prefixes) == 255
    for entry in (short, long):
        assert entry.judgement.distance < 1e-4
        assert entry.judgement.largest < 1e-3
        assert {other.name for other in entry.judgement.hypotheses} >= {"all ones"}
        assert min(other.distance for other in entry.judgement.hypotheses) > 0.1
    assert report.versions["xllamacpp"] == llamacpp.version()
    assert json.loads(json.dumps(report.to_dict()))["regimes"][1]["hypotheses"][0]["name"] == "all ones"


@pytest.fixture(scope="module")
def exact_bench(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(plain["F32"], tmp_path_factory.mktemp("exact"), RECORD, 16)


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("regime", ["short", "long"])
def test_every_mutant_fails_on_f32(exact_bench: Bench, name: str, regime: str) -> None:
    result = exact_bench.check(MUTANTS[name](RECORD), regime)
    assert result.judgement.verdict == "fail"
    assert result.judgement.distance > 30 * FLOAT32.bound


def test_a_mutant_file_fails_as_a_whole_and_is_diagnosed(plain: dict[str, Path], tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.gguf"
    patch_gguf(plain["F32"], wrong, attention(RECORD, 1.21))
    report = verify(wrong, RECORD, prefixes=4)
    assert report.verdict == "fail"
    assert [entry.suspects for entry in report.regimes] == [("attention factor squared",)] * 2


def test_an_unpatched_file_cannot_run_beyond_its_window(plain: dict[str, Path]) -> None:
    with pytest.raises(RuntimeFailure, match="exceeds the available context size"):
        verify(plain["F32"], RECORD, prefixes=2)


def test_short_factors_of_one_are_told_from_the_long_ones(plain: dict[str, Path], tmp_path: Path) -> None:
    record = attention(replace(RECORD, short_factor=(1.0,) * 16), 1.0)
    right, wrong = tmp_path / "right.gguf", tmp_path / "wrong.gguf"
    patch_gguf(plain["F32"], right, record)
    patch_gguf(plain["F32"], wrong, replace(record, short_factor=record.long_factor))
    passed = verify(right, prefixes=4)
    assert passed.verdict == "pass"
    assert [other.name for other in passed.regimes[0].judgement.hypotheses] == ["the long set"]
    verdicts = [entry.judgement.verdict for entry in verify(wrong, record, prefixes=4).regimes]
    assert verdicts == ["fail", "pass"]


def test_a_record_that_changes_nothing_cannot_be_told(plain: dict[str, Path], tmp_path: Path) -> None:
    nothing = tmp_path / "nothing.gguf"
    patch_gguf(plain["F32"], nothing, all_ones(RECORD))
    report = verify(nothing, prefixes=2)
    assert report.verdict == "cannot tell"
    assert "change nothing" in report.regimes[0].judgement.reason


def test_start_tokens_are_noticed_and_named(plain: dict[str, Path], tmp_path: Path) -> None:
    record = replace(RECORD, long_start_tokens=64)
    path = tmp_path / "start.gguf"
    patch_gguf(plain["F32"], path, record, allow_lossy=True)
    report = verify(path, record, prefixes=4, regimes=("long",))
    assert report.verdict == "fail"
    assert "start tokens ignored" in report.regimes[0].suspects
    assert any("un-interpolated" in note for note in report.notes)


# --- llama.cpp, quantised ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantised_bench(plain: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(plain["Q8_0"], tmp_path_factory.mktemp("quantised"), RECORD, 16)


@pytest.mark.parametrize("regime", ["short", "long"])
def test_a_right_quantised_file_passes(quantised_bench: Bench, regime: str) -> None:
    assert quantised_bench.tolerance == EIGHT_BITS
    result = quantised_bench.check(RECORD, regime)
    assert result.judgement.verdict == "pass", result.judgement
    assert result.judgement.distance > FLOAT32.bound  # the wider bound is needed


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_fails_on_q8_0(quantised_bench: Bench, name: str) -> None:
    assert quantised_bench.check(MUTANTS[name](RECORD)).judgement.verdict == "fail"


@pytest.fixture(scope="module")
def smollm2_bench(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("smollm2")
    write_probe(smollm2, folder / "probe.gguf")
    return Bench(folder / "probe.gguf", folder, make(32, 100000.0), 6)


@pytest.mark.parametrize("regime", ["short", "long"])
def test_two_blocks_of_smollm2_pass(smollm2_bench: Bench, regime: str) -> None:
    assert smollm2_bench.check(smollm2_bench.scaling, regime).judgement.verdict == "pass"


# The others are told from it on small files, and slowly here.
@pytest.mark.parametrize(
    "name", [name if name in ("dropped", "swapped") else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS]
)
def test_every_mutant_fails_on_smollm2(smollm2_bench: Bench, name: str) -> None:
    result = smollm2_bench.check(MUTANTS[name](smollm2_bench.scaling))
    assert result.judgement.verdict == "fail", result.judgement


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", [None, *MUTANTS])
def test_the_whole_of_smollm2(smollm2: Path, tmp_path: Path, name: str | None) -> None:
    record = make(32, 100000.0)
    path = tmp_path / "smollm2.gguf"
    patch_gguf(smollm2, path, MUTANTS[name](record) if name else record, allow_lossy=True)
    report = verify(path, record)
    assert report.verdict == ("fail" if name else "pass"), report.to_dict()


# --- transformers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(random_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "model"
    random_llama.save_pretrained(path)
    write_config(path, RECORD)
    return path


def write_config(folder: Path, scaling: RopeScaling) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = scaling.max_position_embeddings
    config["rope_parameters"] = {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": list(scaling.long_factor),
        "short_factor": list(scaling.short_factor), "attention_factor": scaling.long_attention_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings, "factor": scaling.factor,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def test_a_right_folder_passes(folder: Path) -> None:
    report = verify(folder)
    assert report.verdict == "pass"
    assert [(entry.runtime, entry.below, entry.above) for entry in report.regimes] == [
        ("transformers", 16, 0),
        ("transformers", 0, 16),
    ]
    assert max(entry.judgement.distance for entry in report.regimes) < 1e-5
    assert 256 in report.regimes[0].prefixes
    assert 257 in report.regimes[1].prefixes


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_of_a_folder_fails(folder: Path, tmp_path: Path, name: str) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    write_config(wrong, MUTANTS[name](RECORD))
    report = verify(wrong, RECORD)
    assert [entry.judgement.verdict for entry in report.regimes] == ["fail", "fail"]


def test_a_folder_with_a_gguf_is_verified_whole(folder: Path, good: Path, tmp_path: Path) -> None:
    both = tmp_path / "both"
    shutil.copytree(folder, both)
    shutil.copy(good, both / "model.gguf")
    report = verify(both, prefixes=4, probe=True)
    assert report.verdict == "pass"
    assert [entry.runtime for entry in report.regimes] == ["transformers"] * 2 + ["llama.cpp"] * 2
    assert all("first 2 blocks" in entry.file for entry in report.regimes)
    patch_gguf(good, both / "wrong.gguf", swapped(RECORD))
    assert verify(both, RECORD, prefixes=2, probe=True).verdict == "fail"


# --- options ----------------------------------------------------------------------------------------------------


def test_the_bound_can_be_given(good: Path) -> None:
    report = verify(good, prefixes=2, bound=1e-9, regimes=("long",))
    assert report.verdict == "fail"
    assert report.regimes[0].judgement.bound == 1e-9


def test_no_scaling_is_one_clear_error(plain: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="carries no longrope scaling"):
        verify(plain["F32"])
    with pytest.raises(InputFileError, match="does not exist"):
        verify(tmp_path / "absent")
    with pytest.raises(InputFileError, match="nothing to verify"):
        verify(tmp_path)


def test_the_command(good: Path, plain: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(standard_library_text(1000, 3)[:1000])
    (tmp_path / "other.json").write_text(swapped(RECORD).to_json())
    base = ["verify", str(good), "--prefixes", "3", "--max-prefix", "280", "--text", str(tmp_path / "text.txt")]
    passed = CliRunner().invoke(cli, [*base, "--json", "--threads", "1", "--seed", "5"], catch_exceptions=False)
    values = json.loads(passed.stdout)
    assert (passed.exit_code, values["verdict"], values["probe"]) == (0, "pass", False)
    assert max(values["regimes"][1]["prefixes"]) == 280
    assert len(values["regimes"][0]["prefixes"]) == 3
    failed = CliRunner().invoke(cli, [*base, "--probe", "--scaling", str(tmp_path / "other.json"), "--bound", "0.01"])
    assert failed.exit_code == 1
    assert "FAIL" in failed.stdout
    assert "long and short sets exchanged" in " ".join(failed.stdout.split())
    assert "first blocks only" in failed.stdout


def test_a_path_that_looks_like_markup_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(VerificationReport("a[bold]b.gguf", "cannot tell", (), ("[red]c\x1b",), False, {}, 1.0))
    text = capsys.readouterr().out
    assert "CANNOT TELL: a[bold]b.gguf" in text
    assert "[red]c\\x1b" in text


def test_the_command_says_in_one_line_what_is_wrong(plain: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["verify", str(plain["F32"])])
    assert stop.value.code == 1
    assert "carries no longrope scaling" in capsys.readouterr().err


# --- parts ------------------------------------------------------------------------------------------------------


def test_gguf_plans_follow_llamacpps_granule() -> None:
    short, long = plan_gguf(replace(RECORD, original_max_position_embeddings=1000), Limits(16))[0]
    assert (short.context, max(short.prefixes)) == (768, 767)
    assert long.context == 1024
    assert max(long.prefixes) == 1023
    plans, notes = plan_gguf(replace(RECORD, original_max_position_embeddings=100), Limits(16))
    assert [plan.regime for plan in plans] == ["long"]
    assert "never applies the short factors" in notes[0]
    capped, notes = plan_gguf(RECORD, Limits(16, max_prefix=90))
    assert [(plan.context, max(plan.prefixes), len(plan.prefixes)) for plan in capped] == [(256, 90, 16), (512, 90, 16)]
    assert "below it only" in notes[0]


def test_a_file_that_llamacpp_never_scales_cannot_be_told(plain: dict[str, Path]) -> None:
    report = verify(plain["F32"], replace(RECORD, original_max_position_embeddings=99, max_position_embeddings=99))
    assert (report.verdict, report.regimes) == ("cannot tell", ())
    assert len(report.notes) == 2


def test_folder_plans_cross_the_window() -> None:
    short, long = plan_folder(RECORD, Limits(16))[0]
    assert (max(short.prefixes), min(long.prefixes), max(long.prefixes)) == (256, 257, 320)
    with pytest.raises(LongRopeError, match="stay inside the window of 256"):
        plan_folder(RECORD, Limits(16, max_prefix=200))


def test_prompts_are_real_text_and_follow_the_seed() -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    assert prompt_ids(encode, 500, seed=0) == prompt_ids(encode, 500, seed=0)
    assert prompt_ids(encode, 500, seed=0) != prompt_ids(encode, 500, seed=1)
    assert prompt_ids(encode, 5, seed=0, text="abcdef") == list(b"abcde")
    with pytest.raises(TextTooShortError, match="has 6 tokens, 7 are needed"):
        prompt_ids(encode, 7, seed=0, text="abcdef")
    assert len(set(random_ids(97, 1000, seed=0))) == 97
    assert random_ids(97, 10, seed=0) != random_ids(97, 10, seed=1)


def test_alternatives_leave_out_what_is_the_same() -> None:
    assert set(alternatives(RECORD, "long")) == {"all ones", "the short set"}
    static = replace(RECORD, short_factor=RECORD.long_factor)
    assert set(alternatives(static, "short")) == {"all ones"}
    plain = attention(replace(RECORD, short_factor=(1.0,) * 16), 1.0)
    assert set(alternatives(plain, "short")) == {"the long set"}
    assert alternatives(all_ones(RECORD), "long") == {}


def tables(noise: float, toward: float = 0.0, separation: float = 1.0) -> tuple[Any, Any, Any]:
    """A runtime's, the truth's and another hypothesis' log-probabilities [8, 400]."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(8, 400)) * 2.0
    other = truth + separation * rng.normal(size=truth.shape)
    runtime = truth + toward * (other - truth) + noise * rng.normal(size=truth.shape)
    normalised = [values - np.log(np.exp(values).sum(axis=1, keepdims=True)) for values in (runtime, truth, other)]
    return tuple(values.astype(np.float32) for values in normalised)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("case", "tolerance", "verdict"),
    [
        ({"noise": 1e-5}, FLOAT32, "pass"),
        ({"noise": 2e-3}, FLOAT32, "fail"),
        ({"noise": 1e-5, "separation": 5e-4}, FLOAT32, "cannot tell"),
        ({"noise": 9e-4, "separation": 3e-3}, FLOAT32, "fail"),
        ({"noise": 0.05}, EIGHT_BITS, "pass"),
        ({"noise": 0.05, "separation": 0.15}, EIGHT_BITS, "pass"),
        ({"noise": 0.01, "separation": 0.15, "toward": 0.3}, EIGHT_BITS, "fail"),
        ({"noise": 0.05, "separation": 0.05}, EIGHT_BITS, "cannot tell"),
        ({"noise": 0.05, "toward": 1.0}, EIGHT_BITS, "fail"),
    ],
)
def test_verdicts(case: dict[str, float], tolerance: Any, verdict: str) -> None:
    runtime, truth, other = tables(**case)
    judged = judge(runtime, truth, {"other": other}, tolerance)
    assert judged.verdict == verdict, judged
    assert judge(np.full_like(runtime, np.nan), truth, {"other": other}, tolerance).verdict == "fail"


def test_the_share_is_the_place_between_two_hypotheses() -> None:
    runtime, truth, other = tables(0.05, toward=0.25)
    assert judge(runtime, truth, {"other": other}, EIGHT_BITS).hypotheses[0].share == pytest.approx(0.25, abs=0.01)


def test_the_widest_tolerance_of_a_file_counts() -> None:
    assert for_ggml_types(["F32"], 2) == for_ggml_types(["F32"], 80) == FLOAT32
    assert for_ggml_types(["F32", "Q4_1"], 2) == EIGHT_BITS
    assert for_ggml_types(["Q4_K", "F16"], 2).bound >= for_ggml_types(["F16"], 2).bound > FLOAT32.bound


def test_many_quantised_blocks_have_a_wider_bound_and_their_first_two_have_not(smollm2: Path) -> None:
    assert measuring.gguf_tolerance(smollm2, BLOCKS) == EIGHT_BITS
    assert measuring.gguf_tolerance(smollm2).bound == pytest.approx(1.5 * EIGHT_BITS.bound)


# --- probe ------------------------------------------------------------------------------------------------------


def test_a_probe_keeps_bytes_and_cuts_blocks(good: Path, tmp_path: Path) -> None:
    target = tmp_path / "probe.gguf"
    write_probe(good, target)
    whole, cut = read_gguf_header(good), read_gguf_header(target)
    assert (whole.get("llama.block_count"), cut.get("llama.block_count")) == (3, 2)
    names = [info.name for info in whole.tensors if not info.name.startswith("blk.2.")]
    assert [info.name for info in cut.tensors] == names
    assert len(names) < len(whole.tensors)
    assert all(read_raw(whole, name) == read_raw(cut, name) for name in names)
    write_probe(good, tmp_path / "one.gguf", blocks=1)
    assert read_gguf_header(tmp_path / "one.gguf").get("llama.block_count") == 1


def test_a_probe_cuts_arrays_with_one_value_per_block(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "arrays.gguf", "llama")
    writer.add_block_count(3)
    writer.add_head_count_kv([4, 2, 1])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5, 2.5])
    for index in range(3):
        writer.add_tensor(f"blk.{index}.x", np.full(8, index, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_probe(tmp_path / "arrays.gguf", tmp_path / "probe.gguf")
    header = read_gguf_header(tmp_path / "probe.gguf")
    assert header.read_array("llama.attention.head_count_kv").tolist() == [4, 2]
    assert header.read_array("tokenizer.ggml.scores").tolist() == [0.5, 1.5, 2.5]
    assert [info.name for info in header.tensors] == ["blk.0.x", "blk.1.x"]
