"""`patch_gguf` and `longrope patch`: no weight touched, keys right, everything else refused in one line."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.cli.main import cli, main
from longrope_export.converters.gguf.checks import existing_factors
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.errors import (
    InputFileError,
    LossyTargetError,
    OutputError,
    ScalingError,
    UnsupportedModelError,
)
from longrope_export.formats.gguf_header import GgufHeader, read_gguf_header
from longrope_export.formats.gguf_tensors import read_raw, read_tensor
from longrope_export.formats.records import read_scaling
from longrope_export.gguf_architectures import GGUF_ARCHITECTURES

Record = Callable[..., RopeScaling]
Build = Callable[..., Path]

LONG, SHORT, STATIC = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"


def entry_bytes(header: GgufHeader, key: str) -> bytes:
    entry = header.metadata[key]
    return header.path.read_bytes()[entry.start : entry.end]


def test_real_file_keeps_every_weight_and_gets_the_keys(smollm2: Path, tmp_path: Path, record: Record) -> None:
    scaling = record(64, rope_theta=1e5, original_max_position_embeddings=8192, max_position_embeddings=32768)
    target = tmp_path / "new.gguf"
    assert patch_gguf(smollm2, target, scaling) == []
    before, after = read_gguf_header(smollm2), read_gguf_header(target)
    assert after.get("llama.rope.scaling.type") == "longrope"
    assert after.get("llama.rope.scaling.original_context_length") == 8192
    assert after.get("llama.context_length") == 32768
    assert after.get("llama.rope.scaling.attn_factor") == scaling.long_attention_factor
    assert "llama.rope.scaling.factor" not in after.metadata
    assert [info.name for info in after.tensors] == [info.name for info in before.tensors] + [LONG, SHORT]
    data = slice(before.data_start, None)
    assert target.read_bytes()[after.data_start :].startswith(smollm2.read_bytes()[data])
    assert read_tensor(after, LONG).tolist() == list(scaling.long_factor)
    assert read_tensor(after, SHORT).tolist() == list(scaling.short_factor)
    assert read_scaling(target) == scaling


def test_untouched_keys_are_the_same_bytes(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file(keys={"llama.attention.layer_norm_rms_epsilon": 1e-5, "other.rope.scaling.factor": 3.0})
    patch_gguf(source, tmp_path / "new.gguf", record())
    before, after = read_gguf_header(source), read_gguf_header(tmp_path / "new.gguf")
    changed = {"llama.context_length", "llama.rope.freq_base"}
    assert set(before.metadata) <= set(after.metadata)
    for key in set(before.metadata) - changed:
        assert entry_bytes(before, key) == entry_bytes(after, key), key


@pytest.mark.parametrize(
    "key",
    [
        "llama.rope.scaling.factor",
        "llama.rope.scale_linear",
        "llama.rope.scaling.yarn_ext_factor",
        "llama.rope.scaling.yarn_attn_factor",
        "llama.rope.scaling.yarn_beta_fast",
        "llama.rope.scaling.yarn_log_multiplier",
    ],
)
def test_keys_of_other_methods_are_removed(gguf_file: Build, record: Record, tmp_path: Path, key: str) -> None:
    composed = record(short_factor=[4.0] * 8, long_factor=[16.0] * 8)
    patch_gguf(gguf_file(keys={key: 4.0}), tmp_path / "new.gguf", composed)
    assert key not in read_gguf_header(tmp_path / "new.gguf").metadata


def test_patching_is_idempotent_and_forgets_an_earlier_record(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source, first, second = gguf_file(), record(), record(long_factor=[2.0] * 8, max_position_embeddings=4096)
    patch_gguf(source, tmp_path / "a", first)
    patch_gguf(tmp_path / "a", tmp_path / "aa", first)
    patch_gguf(tmp_path / "a", tmp_path / "ab", second)
    patch_gguf(source, tmp_path / "b", second)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "aa").read_bytes()
    assert (tmp_path / "ab").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("alignment", [None, 32, 64, 4096])
def test_tensors_of_an_earlier_scaling_go_from_the_middle(
    gguf_file: Build, record: Record, tmp_path: Path, alignment: int | None
) -> None:
    own = np.linspace(1.0, 1.3, 8)
    source = gguf_file(tensors={STATIC: own, LONG: np.ones(8), SHORT: np.ones(8)}, alignment=alignment)
    patch_gguf(source, tmp_path / "new.gguf", record())
    before, after = read_gguf_header(source), read_gguf_header(tmp_path / "new.gguf")
    assert before.tensors[1].name == STATIC
    assert [info.name for info in after.tensors] == [
        "token_embd.weight", "blk.0.attn_norm.weight", "output.weight", LONG, SHORT,
    ]  # fmt: skip
    for info in after.tensors[:3]:
        assert read_raw(before, info.name) == read_raw(after, info.name)
    assert after.alignment == (alignment or 32)
    assert after.file_size % after.alignment == 0
    assert read_scaling(tmp_path / "new.gguf") == record()


def test_a_last_tensor_without_padding_is_padded(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file()
    last = read_gguf_header(source).tensors[-1]
    end = read_gguf_header(source).data_start + last.offset + last.size
    assert end % 32
    with source.open("r+b") as file:
        file.truncate(end)
    patch_gguf(source, tmp_path / "new.gguf", record())
    after = read_gguf_header(tmp_path / "new.gguf")
    assert read_raw(after, last.name) == read_raw(read_gguf_header(source), last.name)
    assert read_tensor(after, SHORT).tolist() == list(record().short_factor)


def test_missing_freq_base_means_ten_thousand(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file(keys={"llama.rope.freq_base": None})
    patch_gguf(source, tmp_path / "new.gguf", record())
    assert read_gguf_header(tmp_path / "new.gguf").get("llama.rope.freq_base") == 10000.0
    with pytest.raises(ScalingError, match=r"rope_theta 500000, .* has 10000"):
        patch_gguf(source, tmp_path / "other.gguf", record(rope_theta=500000.0))


@pytest.mark.parametrize(
    ("architecture", "scale"),
    [(row.name, row.dimension_count_scale) for row in GGUF_ARCHITECTURES.values() if row.honours_factors],
)
def test_every_architecture_that_uses_factors_is_patched(
    gguf_file: Build, record: Record, tmp_path: Path, architecture: str, scale: int
) -> None:
    source = gguf_file(architecture=architecture, keys={f"{architecture}.rope.dimension_count": 16 * scale})
    patch_gguf(source, tmp_path / "new.gguf", record())
    assert read_scaling(tmp_path / "new.gguf") == record()


@pytest.mark.parametrize("architecture", ["qwen2", "gemma3", "llama4", "pangu-embedded"])
def test_architectures_that_do_not_use_factors_are_refused(
    gguf_file: Build, record: Record, tmp_path: Path, architecture: str
) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"applies no long and short factors in architecture {architecture}"
    ):
        patch_gguf(gguf_file(architecture=architecture), tmp_path / "new.gguf", record(), allow_lossy=True)


@pytest.mark.parametrize("architecture", ["gpt2", "mamba", "bloom"])
def test_a_gguf_without_rope_is_refused(gguf_file: Build, record: Record, tmp_path: Path, architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match="no rotary position embeddings"):
        patch_gguf(gguf_file(architecture=architecture), tmp_path / "new.gguf", record())


@pytest.mark.parametrize(
    ("keys", "changes", "error", "message"),
    [
        ({"llama.rope.dimension_count": 32}, {}, ScalingError, "has 8 factors, .* needs 16"),
        ({"llama.rope.dimension_count": None}, {}, InputFileError, "does not say how many dimensions"),
        ({"llama.attention.key_length": 64, "llama.rope.dimension_count": None}, {}, ScalingError, "needs 32"),
        ({"llama.rope.freq_base": 500000.0}, {}, ScalingError, "has 500000; it was made for another model"),
        ({"split.count": 3}, {}, InputFileError, "one of 3 shards, which are found by their names"),
        ({"llama.context_length": None}, {}, InputFileError, "is not a language model"),
        ({"llama.context_length": 4096}, {}, LossyTargetError, "extends a window of 512, the file has 4096"),
        ({}, {"long_start_tokens": 4}, LossyTargetError, "n̂ = 4"),
        ({}, {"short_start_tokens": 7}, LossyTargetError, "n̂ = 7"),
        ({}, {"short_attention_factor": 1.0}, LossyTargetError, "long attention factor 1.1 in short contexts"),
        ({}, {"sets": {128: [1.0] * 8}}, LossyTargetError, "sets for lengths 128"),
    ],
)  # fmt: skip
def test_refusals_leave_nothing_behind(
    gguf_file: Build, record: Record, tmp_path: Path, keys: Any, changes: Any, error: Any, message: str
) -> None:
    source = gguf_file(keys=keys)
    with pytest.raises(error, match=message):
        patch_gguf(source, tmp_path / "new.gguf", record(**changes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf"]
    if error is LossyTargetError:
        losses = patch_gguf(source, tmp_path / "new.gguf", record(**changes), allow_lossy=True)
        assert len(losses) == 1
        assert read_scaling(tmp_path / "new.gguf") == record(**changes)


def test_own_static_factors_must_be_in_the_record(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    own = np.array([1, 1, 1, 1, 2, 8, 8, 8.0])
    source = gguf_file(tensors={STATIC: own})
    found = existing_factors(read_gguf_header(source))
    assert found is not None
    assert found.tolist() == own.tolist()
    naive = record(short_factor=[1.0] * 8)
    with pytest.raises(LossyTargetError, match=r"rope_freqs.weight, up to 8.* compose them"):
        patch_gguf(source, tmp_path / "new.gguf", naive)
    assert "rope_freqs" in patch_gguf(source, tmp_path / "lossy.gguf", naive, allow_lossy=True)[0]
    composed = record(short_factor=own.tolist(), long_factor=(own * 4).tolist())
    assert patch_gguf(source, tmp_path / "new.gguf", composed) == []
    assert existing_factors(read_gguf_header(tmp_path / "new.gguf")) is None


@pytest.mark.parametrize(
    "keys",
    [
        {"llama.rope.scale_linear": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 128,
        },
    ],
)
def test_own_linear_and_yarn_scaling_must_be_in_the_record(
    gguf_file: Build, record: Record, tmp_path: Path, keys: dict[str, Any]
) -> None:
    source = gguf_file(keys=keys)
    with pytest.raises(LossyTargetError, match=r"\(rope\.scaling, up to 4\).* compose them"):
        patch_gguf(source, tmp_path / "new.gguf", record(short_factor=[1.0] * 8))
    own = existing_factors(read_gguf_header(source))
    assert own is not None
    composed = record(short_factor=own.tolist(), long_factor=(own * 4).tolist())
    assert patch_gguf(source, tmp_path / "new.gguf", composed) == []
    assert existing_factors(read_gguf_header(tmp_path / "new.gguf")) is None


def test_truncated_at_every_byte(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file()
    header, raw = read_gguf_header(source), source.read_bytes()
    last = header.tensors[-1]
    for size in range(header.data_start + last.offset + last.size):
        (tmp_path / "cut.gguf").write_bytes(raw[:size])
        with pytest.raises(InputFileError):
            patch_gguf(tmp_path / "cut.gguf", tmp_path / "new.gguf", record())
    assert not (tmp_path / "new.gguf").exists()


@pytest.mark.parametrize("link", ["same", "symlink", "hard link"])
def test_source_and_target_must_differ(gguf_file: Build, record: Record, tmp_path: Path, link: str) -> None:
    source = gguf_file()
    target = source if link == "same" else tmp_path / "link.gguf"
    if link == "symlink":
        target.symlink_to(source)
    elif link == "hard link":
        target.hardlink_to(source)
    before = source.read_bytes()
    with pytest.raises(OutputError, match="is the source itself"):
        patch_gguf(source, target, record(), overwrite=True)
    assert source.read_bytes() == before


def run_patch(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["patch", *map(str, arguments)], catch_exceptions=True)


def test_command_prints_json_and_notes(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    (tmp_path / "longrope.json").write_text(record(long_start_tokens=2).to_json())
    options = [gguf_file(), "--scaling", tmp_path / "longrope.json", "--out", tmp_path / "new.gguf"]
    assert isinstance(run_patch(*options).exception, LossyTargetError)
    result = json.loads(run_patch(*options, "--allow-lossy", "--json").stdout)
    assert result["path"] == str(tmp_path / "new.gguf")
    assert result["bytes"] == (tmp_path / "new.gguf").stat().st_size
    assert len(result["lossy"]) == 1
    assert any("context shift" in note for note in result["notes"])
    assert any("any -c above 512" in note for note in result["notes"])
    assert isinstance(run_patch(*options, "--allow-lossy").exception, OutputError)
    text = run_patch(*options, "--allow-lossy", "--overwrite").stdout
    assert "window 512 → 2048" in text
    assert "lost: llama.cpp will rescale the first 2 positions too" in text


def test_errors_are_one_line_and_exit_1(
    gguf_file: Build, record: Record, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "longrope.json").write_text(record(rope_theta=2.0).to_json())
    scaling, out = str(tmp_path / "longrope.json"), str(tmp_path / "new.gguf")
    with pytest.raises(SystemExit) as stopped:
        main(["patch", str(gguf_file()), "--scaling", scaling, "--out", out])
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert message.startswith("longrope: the record is for rope_theta 2,")
    assert not Path(out).exists()


CHILD = """
import resource, signal, sys
limit = int(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from longrope_export.cli.main import main
try:
    main(sys.argv[2:])
finally:
    heavy = sorted({"torch", "transformers"} & set(sys.modules))
    # VmHWM begins anew in this program; ru_maxrss would count the parent's memory at the fork
    status = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    print("loaded", heavy, "megabytes", int(status["VmHWM"].split()[0]) // 1024, file=sys.stderr)
"""


def run_child(limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(limit), "patch", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})


@pytest.mark.parametrize("limit", [100, 1000, 500_000])
def test_a_write_that_the_system_refuses_leaves_nothing(
    gguf_file: Build, record: Record, tmp_path: Path, limit: int
) -> None:
    source = gguf_file(tensors={"blk.0.ffn_up.weight": np.zeros((500, 500))})
    (tmp_path / "longrope.json").write_text(record().to_json())
    before = sorted(tmp_path.iterdir())
    done = run_child(limit, source, "--scaling", tmp_path / "longrope.json", "--out", tmp_path / "new.gguf")
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].endswith("new.gguf was not written: File too large")
    assert sorted(tmp_path.iterdir()) == before


def test_neither_torch_nor_much_memory(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file(tensors={"blk.0.ffn_up.weight": np.zeros((6000, 6000))})
    (tmp_path / "longrope.json").write_text(record().to_json())
    done = run_child(0, source, "--scaling", tmp_path / "longrope.json", "--out", tmp_path / "new.gguf")
    assert done.returncode == 0, done.stderr
    said = re.fullmatch(r"loaded \[\] megabytes (\d+)\n", done.stderr)
    assert said, done.stderr
    assert int(said[1]) < 100
