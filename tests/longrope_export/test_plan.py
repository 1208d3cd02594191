"""`longrope plan`: cache bytes by hand, the fit, and a real probe."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.cli.plan import duration, plan, size
from longrope_export.description import ModelDescription, describe
from longrope_export.errors import ScalingError
from longrope_export.families import FULL, SLIDING
from longrope_export.planning import (
    Attention,
    Estimate,
    Measurement,
    available_memory,
    estimate_at,
    kv_cache_bytes,
    make_plan,
    predict,
    weight_bytes,
)
from longrope_export.probe import ProbeRequest, _collect, _crash, run_probe


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> ModelDescription:
    return describe(tiny_llama)


def measured(length: int, seconds: float, cpu: float, peak: int | None) -> Measurement:
    return Measurement(length, seconds, cpu, peak)


# ---------------------------------------------------------------- cache and weights


def test_cache_of_the_tiny_model(tiny: ModelDescription) -> None:
    """2 layers × (K, V) × 1 head of 32 values × 128 positions, 2 bytes a value or 34 for 32."""
    assert kv_cache_bytes(tiny, 128) == 2 * 2 * 32 * 2 * 128 == 32768
    assert kv_cache_bytes(tiny, 128, "q8_0") == 2 * 2 * 34 * 128 == 17408


def test_cache_of_smollm2_at_32k(smollm2: Path) -> None:
    """30 layers, 3 KV heads of 64: 720 MiB in f16."""
    description = describe(smollm2)
    assert kv_cache_bytes(description, 32768) == 30 * 2 * 192 * 2 * 32768 == 720 * 2**20
    assert kv_cache_bytes(description, 32768, "q8_0") == 30 * 2 * 6 * 34 * 32768 == 401080320


def test_sliding_layers_keep_their_window_only(tiny: ModelDescription) -> None:
    sliding = replace(tiny, layer_types=(SLIDING, FULL), sliding_window=16)
    assert kv_cache_bytes(sliding, 128) == 2 * 64 * (16 + 128)
    assert kv_cache_bytes(sliding, 8) == 2 * 64 * (8 + 8)
    assert kv_cache_bytes(replace(sliding, layer_types=()), 128) == 32768


def test_a_started_block_counts_in_full(tiny: ModelDescription) -> None:
    assert kv_cache_bytes(replace(tiny, head_dim=33), 10, "q8_0") == 2 * 2 * 68 * 10


def test_weights_are_the_files(tiny: ModelDescription, tiny_llama: Path, smollm2: Path) -> None:
    assert weight_bytes(tiny) == (tiny_llama / "model.safetensors").stat().st_size
    assert weight_bytes(describe(smollm2)) == smollm2.stat().st_size


# ---------------------------------------------------------------- the fit


@pytest.mark.parametrize("coefficients", [(0.1, 0.002, 3e-6), (0.0, 0.002, 3e-6), (0.3, 0.0, 3e-6), (0.1, 0.002, 0.0)])
def test_the_fit_recovers_a_quadratic(coefficients: tuple[float, float, float]) -> None:
    a, b, c = coefficients
    points = [(length, a + b * length + c * length**2) for length in (128, 256, 512, 1024)]
    assert predict(32768, points, degree=2) == pytest.approx(a + b * 32768 + c * 32768**2, rel=1e-6)


def test_the_fit_never_takes_a_negative_part() -> None:
    flattening = [(128, 1.0), (256, 1.9), (512, 3.4), (1024, 5.8)]
    lengths, values = [length for length, _ in flattening], [value for _, value in flattening]
    free = np.polyval(np.polyfit(lengths, values, 2), 2**20)
    assert free < 0 < 5.8 * 1000 < predict(2**20, flattening, degree=2)


def test_few_points_still_give_a_number() -> None:
    assert predict(400, [(100, 2.0)], degree=2) == pytest.approx(8.0)
    assert predict(400, [(100, 2.0), (200, 3.0)], degree=2) == pytest.approx(5.0)


def test_memory_is_fitted_beyond_the_chunk_of_logits() -> None:
    """Below 512 tokens the logits grow too; the slope there is not the model's."""
    peaks = {128: 1000, 256: 2000, 512: 4000, 1024: 4100, 2048: 4300}
    measurements = [measured(length, 1.0, 1.0, peak) for length, peak in peaks.items()]
    assert estimate_at(4096, measurements, dtype="float32", threads=1).peak_bytes == pytest.approx(4700, abs=5)
    short = estimate_at(1024, measurements[:2], dtype="float32", threads=1)
    assert short.peak_bytes == pytest.approx(8000)
    assert estimate_at(1024, measurements[:1], dtype="float32", threads=1).peak_bytes is None
    unknown = [measured(64, 1.0, 1.0, None), measured(128, 1.0, 1.0, None)]
    assert estimate_at(1024, unknown, dtype="float32", threads=1).peak_bytes is None


def test_the_fastest_of_repeated_forwards_counts_and_the_shortest_lengths_do_not() -> None:
    """Weights are read in 5 s whatever the length; 2 threads, and half of the time other programs run."""
    points = [(32, 5.0), (128, 1.28), (256, 2.56), (512, 5.12), (1024, 10.24)]
    measurements = [measured(length, seconds, seconds, None) for length, seconds in points]
    slow = measured(1024, 99.0, 99.0, None)
    estimate = estimate_at(4096, [slow, *measurements], dtype="bfloat16", threads=2)
    assert estimate.seconds == pytest.approx(40.96, rel=1e-6)
    assert estimate.quiet_seconds == pytest.approx(20.48, rel=1e-6)
    assert estimate.longest == 1024


def test_attention_measured_by_itself_gives_the_quadratic_part() -> None:
    """10 layers of 0.4 s at 4,096 tokens; the forwards are too short to show it."""
    points = [(length, 0.002 * length + 4.0 * (length / 4096) ** 2) for length in (128, 256, 512)]
    measurements = [measured(length, seconds, seconds / 2, None) for length, seconds in points]
    estimate = estimate_at(
        32768, measurements, dtype="bfloat16", threads=1, layers=10, attention=Attention(4096, 0.4, 0.2)
    )
    assert estimate.seconds == pytest.approx(0.002 * 32768 + 4.0 * 64, rel=1e-6)
    assert estimate.quiet_seconds == pytest.approx(estimate.seconds / 2, rel=1e-6)


def test_attention_slower_than_the_whole_forward_leaves_something_for_the_rest() -> None:
    estimate = estimate_at(
        200, [measured(100, 1.0, 1.0, None)], dtype="bfloat16", threads=1, layers=1, attention=Attention(100, 2, 2)
    )
    assert estimate.seconds == pytest.approx(0.2 + 4 * 2.0)


# ---------------------------------------------------------------- the plan


def test_what_does_not_fit_is_said(tiny: ModelDescription) -> None:
    estimate = Estimate(1.0, 1.0, 50_000, (measured(32, 1.0, 1.0, 1),), None, "float32", 1)
    result = make_plan(tiny, 128, probe=lambda: (estimate, ()))
    weights = weight_bytes(tiny)
    assert result.needed == {"f16": weights + 32768, "q8_0": weights + 17408}
    tight = replace(result, available=weights + 20_000)
    assert tight.fits == {"f16": False, "q8_0": True, "evaluation": True}
    assert replace(result, available=49_999).fits == {"f16": False, "q8_0": False, "evaluation": False}
    assert replace(result, available=None).fits == {"f16": None, "q8_0": None, "evaluation": None}
    assert make_plan(tiny, 128).fits["evaluation"] is None


def test_a_window_that_does_not_grow_is_refused(tiny: ModelDescription) -> None:
    with pytest.raises(ScalingError, match="a window of 32 tokens; 32 is no extension"):
        make_plan(tiny, 32)


def test_an_extended_model_can_be_planned_for_its_own_window(tiny: ModelDescription) -> None:
    record = RopeScaling(
        rope_theta=1e4,
        rotary_dim=32,
        original_max_position_embeddings=32,
        max_position_embeddings=128,
        long_factor=(4.0,) * 16,
    )
    result = make_plan(replace(tiny, window=128, scaling=record), 128)
    assert (result.window, result.target, result.kv_cache["f16"]) == (32, 128, 32768)


def test_available_memory_is_a_sane_number() -> None:
    free = available_memory()
    if sys.platform == "linux":
        assert free is not None
        assert 10**7 < free < 10**14


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (8.14, "8.1 s"), (42.0, "42 s"), (125.0, "2 min 05 s"), (12000.0, "3 h 20 min")],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_for_people() -> None:
    assert [size(count) for count in (12, 2048, 720 * 2**20, 3 * 2**30, 2**41)] == [
        "12 B", "2.0 KiB", "720.0 MiB", "3.0 GiB", "2.0 TiB"
    ]  # fmt: skip


# ---------------------------------------------------------------- the probe


def test_plan_command_probes_the_tiny_model_with_its_options(tiny_llama: Path) -> None:
    """The probe reaches the target itself, so nothing is extrapolated."""
    arguments = [str(tiny_llama), "--to", "200", "--threads", "3", "--dtype", "float32", "--json"]
    result = CliRunner().invoke(plan, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    values = json.loads(result.stdout)
    assert (values["window"], values["target"], values["not_measured"]) == (32, 200, [])
    assert values["kv_cache"] == {"f16": 2 * 2 * 32 * 2 * 200, "q8_0": 2 * 2 * 34 * 200}
    estimate = values["estimate"]
    assert (estimate["threads"], estimate["dtype"]) == (3, "float32")
    assert sorted({entry["length"] for entry in estimate["measurements"]}) == [32, 64, 128, 200]
    longest = [entry["seconds"] for entry in estimate["measurements"] if entry["length"] == 200]
    assert estimate["seconds"] == min(longest), "what was measured needs no fit"
    assert 0 < estimate["attention"]["seconds"] < estimate["seconds"] * 3
    assert estimate["attention"]["length"] == 200
    assert "  200 tokens: " in result.stderr
    if sys.platform == "linux":
        assert 50e6 < estimate["peak_bytes"] < 4e9


def test_plan_without_a_probe_prints_a_table(smollm2: Path) -> None:
    result = CliRunner().invoke(plan, [str(smollm2), "--to", "32k", "--no-probe"], catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stderr == ""
    text = " ".join(result.stdout.split())
    assert "8,192 → 32,768 tokens" in text
    assert "KV cache, f16 720.0 MiB" in text
    assert "KV cache, q8_0 382.5 MiB" in text
    assert "llama.cpp yes, as GGUF llama" in text
    assert "time and memory of an evaluation: --no-probe" in text
    assert "one evaluation" not in text


def test_plan_refuses_a_shorter_window_in_one_line(smollm2: Path) -> None:
    code = "import sys; from longrope_export.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "plan", str(smollm2), "--to", "4k", "--no-probe"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "4096 is no extension" in done.stderr


def test_without_torch_the_plan_says_what_was_not_measured(smollm2: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from longrope_export.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "plan", str(smollm2), "--to", "16k", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    values = json.loads(done.stdout)
    assert values["estimate"] is None
    assert "torch not installed; pip install 'longrope-export[model]'" in values["not_measured"][0]
    assert values["kv_cache"]["f16"] == 360 * 2**20


def test_no_probe_does_not_import_torch(smollm2: Path) -> None:
    code = (
        "import sys; from longrope_export.cli.plan import plan\n"
        "plan.main(sys.argv[1:], standalone_mode=False)\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(smollm2), "--to", "16k", "--no-probe"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_a_model_too_big_for_the_memory_is_not_probed(tiny: ModelDescription) -> None:
    if available_memory() is None:
        pytest.skip("this system does not report its free memory")
    estimate, missing = run_probe(replace(tiny, parameters=10**14), 128)
    assert estimate is None
    assert "loading takes about 200001.1 GB" in missing[0]


def test_a_probe_that_fails_says_why(tmp_path: Path) -> None:
    request = ProbeRequest(path=str(tmp_path / "nothing"), target=64, vocab=97, heads=2, head_dim=32)
    measurements, _, _, problem = _collect(request, None)
    assert measurements == []
    assert problem is not None
    assert "nothing does not exist" in problem


def test_a_killed_probe_is_reported() -> None:
    with tempfile.TemporaryFile() as errors:
        assert _crash(-9, errors) == "the probe was killed by signal 9 (out of memory?)"
        errors.write(b"Traceback\nRuntimeError: out of cheese\n")
        assert _crash(1, errors) == "the probe failed: RuntimeError: out of cheese"
