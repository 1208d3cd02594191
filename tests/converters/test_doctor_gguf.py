"""`longrope doctor` on GGUF files: each misconfiguration is found on a file made wrong on purpose, and mended."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_gguf import change, renamed
from click.testing import CliRunner

from longrope_export import RopeScaling
from longrope_export.cli.main import cli
from longrope_export.converters.doctor.examine import examine
from longrope_export.converters.doctor.findings import ERROR, INFORMATION, WARNING, Finding
from longrope_export.converters.doctor.gguf_factors import looks_inverted, unusual_factors
from longrope_export.converters.doctor.gguf_rules import GGUF_RULES
from longrope_export.converters.doctor.hf_rules import HF_RULES
from longrope_export.converters.doctor.repair import repair
from longrope_export.converters.gguf.encode import encode_head, encode_tensor_info
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.errors import InputFileError, LossyTargetError
from longrope_export.formats.gguf_header import align, read_gguf_header
from longrope_export.formats.gguf_tensors import read_tensor
from longrope_export.formats.records import read_scaling

LONG, SHORT, STATIC = "rope_factors_long.weight", "rope_factors_short.weight", "rope_freqs.weight"
RECORD = "longrope_export.scaling"
TYPE, FACTOR = "llama.rope.scaling.type", "llama.rope.scaling.factor"
ORIGINAL, ATTENTION = "llama.rope.scaling.original_context_length", "llama.rope.scaling.attn_factor"
WINDOW, BASE = "llama.context_length", "llama.rope.freq_base"
NORMAL = {"G18", "G25", "G33", "G34", "G35", "G36", "G37"}

Record = Callable[..., RopeScaling]
Build = Callable[..., Path]
Break = Callable[..., Path]


def without_record(path: Path, *keys: str) -> Path:
    return change(path, removed=frozenset({RECORD, *keys}))


def with_tensor(path: Path, name: str, ggml_type: int, shape: tuple[int, ...], raw: bytes) -> Path:
    """`path` with one tensor of any type and shape as its last."""
    header = read_gguf_header(change(path, dropped=frozenset({name})))
    blob = path.read_bytes()
    end = align(header.file_size - header.data_start, header.alignment)
    head = encode_head(header.version, len(header.tensors) + 1, len(header.metadata))
    info = encode_tensor_info(name, shape, ggml_type, end)
    head += blob[header.kv_start : header.infos_end] + info
    data = blob[header.data_start :].ljust(end, b"\0") + raw
    path.write_bytes(head.ljust(align(len(head), header.alignment), b"\0") + data)
    return path


def names(path: Path, *severities: str) -> set[str]:
    return {found.rule.name for found in examine(path) if found.severity in (severities or (ERROR, WARNING))}


def only(path: Path, name: str) -> Finding:
    return next(found for found in examine(path) if found.rule.name == name)


@pytest.fixture
def patched(gguf_file: Build, record: Record, tmp_path: Path) -> Path:
    keys = {"llama.embedding_length": 64, "llama.attention.head_count": 4}
    patch_gguf(gguf_file("plain.gguf", keys=keys), tmp_path / "patched.gguf", record())
    return tmp_path / "patched.gguf"


@pytest.fixture
def foreign(patched: Path) -> Path:
    """As another tool would have written it: no record of ours."""
    return without_record(patched)


def test_our_own_output_and_a_plain_file_are_clean(patched: Path, tmp_path: Path) -> None:
    assert names(patched) == set()
    assert names(patched, INFORMATION) == NORMAL
    assert examine(tmp_path / "plain.gguf") == []
    assert repair(patched) == []


@pytest.mark.parametrize(
    ("architecture", "keys", "tensors"),
    [
        ("llama", {TYPE: "linear", FACTOR: 4.0}, {}),
        ("llama", {TYPE: "yarn", FACTOR: 4.0, ORIGINAL: 512, WINDOW: 2048}, {}),
        ("llama", {}, {STATIC: np.linspace(1.0, 8.0, 8)}),
        ("llama", {FACTOR: 1.0}, {}),
        ("qwen2", {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}, {}),
        ("mamba", {}, {}),
    ],
)
def test_other_scalings_are_clean(
    gguf_file: Build, architecture: str, keys: dict[str, Any], tensors: dict[str, Any]
) -> None:
    path = gguf_file("other.gguf", architecture=architecture, keys=keys, tensors=tensors)
    assert names(path) == set()


def test_every_rule_has_the_name_it_is_found_under() -> None:
    assert [f"G{number:02}" for number in range(1, 40)] == list(GGUF_RULES)
    assert all(rule.name == name and rule.condition and rule.symptom for name, rule in GGUF_RULES.items())


def half(path: Path) -> Path:
    values = read_tensor(read_gguf_header(path), LONG)
    return with_tensor(path, LONG, 1, (8,), values.astype(np.float16).tobytes())


def square(path: Path) -> Path:
    return with_tensor(path, LONG, 0, (4, 2), np.ones(8, np.float32).tobytes())


# what breaks a foreign file, the finding, and whether --fix alone, or a record, mends it
BROKEN: list[tuple[str, Callable[[Path], Path], str, bool]] = [
    ("G01", lambda path: renamed(path, "qwen2"), ERROR, True),
    ("G01", lambda path: change(path, dropped=frozenset({LONG, SHORT}), removed=frozenset({TYPE}),
                                vectors={STATIC: (1.0,) * 8}, entries={"general.architecture": "starcoder2"}), ERROR, True),
    ("G02", lambda path: renamed(path, "pangu-embedded"), ERROR, True),
    ("G03", lambda path: change(path, dropped=frozenset({LONG, SHORT})), ERROR, False),
    ("G04", lambda path: change(path, removed=frozenset({TYPE})), ERROR, True),
    ("G04", lambda path: change(path, entries={TYPE: "yarn"}), ERROR, True),
    ("G05", lambda path: change(path, entries={TYPE: "longrop"}), ERROR, True),
    ("G05", lambda path: change(path, entries={TYPE: "su"}, dropped=frozenset({LONG, SHORT})), ERROR, True),
    ("G06", lambda path: change(path, vectors={STATIC: tuple(np.linspace(1.0, 1.3, 8))}), ERROR, True),
    ("G06", lambda path: change(path, vectors={STATIC: (2.0,) * 8}, dropped=frozenset({LONG, SHORT})), ERROR, True),
    ("G07", half, ERROR, True),
    ("G08", square, ERROR, False),
    ("G08", lambda path: change(path, vectors={SHORT: (1.0,) * 7}), ERROR, False),
    ("G09", lambda path: change(path, vectors={LONG: (1.0,) * 7 + (0.0,)}), ERROR, False),
    ("G09", lambda path: change(path, vectors={LONG: (1.0,) * 7 + (-2.0,)}), ERROR, False),
    ("G09", lambda path: change(path, vectors={SHORT: (math.inf,) + (1.0,) * 7}), ERROR, False),
    ("G09", lambda path: change(path, vectors={SHORT: (math.nan,) + (1.0,) * 7}), ERROR, False),
    ("G10", lambda path: change(path, vectors={LONG: tuple(1 / np.linspace(1, 8, 8))}), WARNING, False),
    ("G11", lambda path: change(path, entries={FACTOR: 4.0}), ERROR, True),
    ("G11", lambda path: change(path, entries={"llama.rope.scale_linear": 2.0}), ERROR, True),
    ("G12", lambda path: change(path, removed=frozenset({ORIGINAL})), ERROR, False),
    ("G13", lambda path: change(path, entries={ORIGINAL: 4096}), ERROR, False),
    ("G15", lambda path: change(path, entries={ORIGINAL: 2048}), WARNING, False),
    ("G16", lambda path: change(path, removed=frozenset({ATTENTION})), WARNING, False),
    ("G17", lambda path: change(path, entries={ATTENTION: 1.5}), WARNING, False),
    ("G19", lambda path: change(path, dropped=frozenset({SHORT})), WARNING, True),
    ("G19", lambda path: change(path, dropped=frozenset({LONG})), WARNING, False),
    ("G20", lambda path: change(path, entries={"llama.attention.key_length": 32}), ERROR, False),
    ("G22", lambda path: change(path, removed=frozenset({BASE})), WARNING, False),
    ("G23", lambda path: change(path, entries={"llama.rope.scaling.yarn_beta_fast": 16.0}), WARNING, True),
    ("G24", lambda path: renamed(path, "granite", logit_scale=1.0, rope__scaling__finetuned=False), ERROR, True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spoil", "severity", "alone"), BROKEN, ids=[f"{row[0]}-{n}" for n, row in enumerate(BROKEN)]
)
def test_each_wrong_file_is_named_and_mended(
    foreign: Path, record: Record, name: str, spoil: Break, severity: str, alone: bool, tmp_path: Path
) -> None:
    path = spoil(foreign)
    found = only(path, name)
    assert found.severity == severity
    assert (found.changes is not None) == alone
    if alone:
        assert repair(path) == [path]
    elif name == "G20":
        assert found.mended_by is None
        return
    else:
        before = path.read_bytes()
        assert repair(path) == []
        assert path.read_bytes() == before
        assert repair(path, record()) == [path]
        assert read_scaling(path) == record()
    # the formula's value is not the record's 1.1, and only a record of ours says that this is meant
    assert names(path) <= {"G17"}


def test_dimension_count_is_set_when_the_factors_fit_the_head(foreign: Path) -> None:
    change(
        foreign, entries={"llama.rope.dimension_count": 8}, dropped=frozenset({LONG, SHORT}), removed=frozenset({TYPE})
    )
    assert "set it to 16" in only(foreign, "G20").advice
    repair(foreign)
    assert read_gguf_header(foreign).get("llama.rope.dimension_count") == 16
    assert names(foreign) == set()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: change(path, dropped=frozenset({LONG, SHORT})),
        lambda path: change(path, dropped=frozenset({LONG, SHORT}), removed=frozenset({TYPE})),
        lambda path: change(path, dropped=frozenset({LONG, SHORT}), entries={TYPE: "su"}),
        lambda path: change(path, dropped=frozenset({SHORT})),
        lambda path: change(path, removed=frozenset({ORIGINAL})),
        lambda path: change(path, removed=frozenset({ATTENTION})),
        lambda path: change(path, removed=frozenset({BASE})),
        lambda path: change(path, entries={BASE: 5e5}),
        lambda path: change(path, entries={WINDOW: 512}),
        lambda path: change(path, entries={WINDOW: 256}),
        lambda path: change(path, entries={ATTENTION: 1.2}),
    ],
)
def test_a_record_of_ours_mends_what_was_edited_away(patched: Path, record: Record, spoil: Break) -> None:
    assert names(spoil(patched))
    assert repair(patched) == [patched]
    assert names(patched) == set()
    assert read_scaling(patched) == record()


def test_factors_that_contradict_the_record_need_another_one(patched: Path, record: Record) -> None:
    change(patched, vectors={LONG: (3.0,) * 8})
    found = only(patched, "G39")
    assert (found.severity, found.changes, found.mended_by) == (ERROR, None, "--fix --scaling FILE")
    assert "long_factor" in found.detail
    repair(patched, record(long_factor=[3.0] * 8))
    assert names(patched) == set()
    assert read_tensor(read_gguf_header(patched), LONG).tolist() == [3.0] * 8


def test_factors_that_do_not_hold_the_static_ones_need_a_record_that_does(foreign: Path, record: Record) -> None:
    change(foreign, vectors={STATIC: (8.0,) * 8})
    assert only(foreign, "G06").mended_by == "--fix --scaling FILE"
    with pytest.raises(LossyTargetError, match="compose them with"):
        repair(foreign, record())
    with pytest.raises(LossyTargetError, match="longrope patch --allow-lossy"):
        repair(foreign, record(short_factor=[8.0] * 8, long_start_tokens=4))
    composed = record(short_factor=[8.0] * 8)
    repair(foreign, composed)
    assert names(foreign) == set()
    assert read_scaling(foreign) == composed


def test_tensors_taken_out_leave_a_plain_model(foreign: Path) -> None:
    repair(renamed(foreign, "qwen2"))
    header = read_gguf_header(foreign)
    assert {info.name for info in header.tensors} == {"token_embd.weight", "blk.0.attn_norm.weight", "output.weight"}
    assert header.get("qwen2.context_length") == 512
    assert not [key for key in header.metadata if "scaling" in key]


def test_missing_short_factors_become_ones(foreign: Path) -> None:
    repair(change(foreign, dropped=frozenset({SHORT})))
    assert read_tensor(read_gguf_header(foreign), SHORT).tolist() == [1.0] * 8


def test_what_a_record_cannot_mend_names_the_source(foreign: Path, record: Record) -> None:
    change(renamed(foreign, "qwen2"), dropped=frozenset({LONG, SHORT}))
    found = only(foreign, "G03")
    assert (found.mended_by, "the source checkpoint" in found.advice) == (None, True)
    assert repair(foreign, record()) == []


def test_an_unreadable_record_is_removed(patched: Path) -> None:
    change(patched, entries={RECORD: '{"format": "longrope-export/99"}'})
    assert names(patched, ERROR) == {"G39"}
    repair(patched)
    assert RECORD not in read_gguf_header(patched).metadata
    assert names(patched) == {"G17"}


def test_a_window_that_is_no_multiple_of_256(gguf_file: Build, record: Record, tmp_path: Path) -> None:
    source = gguf_file(keys={WINDOW: 500})
    patch_gguf(source, tmp_path / "new.gguf", record(original_max_position_embeddings=500))
    assert names(tmp_path / "new.gguf") == {"G14"}
    assert "-c 256" in only(tmp_path / "new.gguf", "G14").advice
    static = record(original_max_position_embeddings=500, long_factor=[2.0] * 8, short_factor=[2.0] * 8)
    patch_gguf(source, tmp_path / "static.gguf", static)
    assert names(tmp_path / "static.gguf") == set()
    assert names(tmp_path / "static.gguf", INFORMATION) == {"G18", "G25", "G37"}


@pytest.mark.parametrize(
    ("factors", "unusual", "inverted"),
    [
        ((1.0, 2.0, 8.0), None, False),
        ((1.0, 0.5, 0.125), "2 below 1 (least 0.125), 2 smaller than the one before", True),
        ((1.0, 0.9, 8.0), "1 below 1 (least 0.9), 1 smaller than the one before", False),
        ((0.9, 0.95, 0.97), "3 below 1 (least 0.9)", False),
        ((1.0, 1.0, 1.0, 0.9), "1 below 1 (least 0.9), 1 smaller than the one before", False),
        ((1.0, 4.0, 2.0), "1 smaller than the one before", False),
    ],
)
def test_inverted_lists_are_told_from_unusual_ones(
    factors: tuple[float, ...], unusual: str | None, inverted: bool
) -> None:
    assert unusual_factors(factors) == unusual
    assert looks_inverted(factors) == inverted


def test_unusual_factors_alone_are_information(foreign: Path) -> None:
    change(foreign, vectors={LONG: (1.0, 0.9, 2.0, 3.0, 2.5, 6.0, 7.0, 8.0)})
    assert only(foreign, "G10").severity == INFORMATION
    assert names(foreign) == {"G17"}


def test_granite_without_rope_or_scale(foreign: Path, gguf_file: Build) -> None:
    assert names(renamed(foreign, "granite"), ERROR) == {"G24"}
    assert only(foreign, "G24").mended_by is None
    plain = renamed(gguf_file(), "granite", logit_scale=1.0, rope__scaling__finetuned=False)
    assert (only(plain, "G24").severity, only(plain, "G24").changes) == (WARNING, None)


def test_minicpm_with_scales_of_its_own(foreign: Path) -> None:
    same = {"block_count": 4, "embedding_scale": 12.0, "residual_scale": 0.7, "logit_scale": 4.0}
    assert names(renamed(foreign, "minicpm", **same)) == {"G17"}
    change(foreign, entries={"minicpm.residual_scale": 1.0})
    assert names(foreign, WARNING) == {"G17", "G26"}


def bools(values: list[bool]) -> bytes:
    key = b"step35.attention.sliding_window_pattern"
    return struct.pack("<Q", len(key)) + key + struct.pack(f"<IIQ{len(values)}?", 9, 7, len(values), *values)


def with_entry(path: Path, raw: bytes) -> Path:
    """`path` with one more key-value pair, given as its bytes."""
    header, blob = read_gguf_header(path), path.read_bytes()
    head = encode_head(header.version, len(header.tensors), len(header.metadata) + 1)
    head += blob[header.kv_start : header.kv_end] + raw + blob[header.kv_end : header.infos_end]
    path.write_bytes(head.ljust(align(len(head), header.alignment), b"\0") + blob[header.data_start :])
    return path


def test_an_incomplete_step35(foreign: Path) -> None:
    renamed(foreign, "step35", rope__dimension_count=32)
    assert "no list per layer" in only(foreign, "G27").detail
    with_entry(foreign, bools([False, False, True]))
    assert names(foreign) == {"G17"}
    change(foreign, removed=frozenset({"step35.attention.sliding_window_pattern"}))
    assert "no layer has a sliding window" in only(with_entry(foreign, bools([False])), "G27").detail
    change(
        foreign, removed=frozenset({"step35.attention.sliding_window_pattern"}), dropped=frozenset({"output.weight"})
    )
    assert "output.weight" in only(with_entry(foreign, bools([True])), "G27").detail
    assert names(foreign, ERROR) == {"G27"}


def test_step35_without_its_doubled_dimension_count(foreign: Path) -> None:
    with_entry(renamed(foreign, "step35"), bools([True]))
    assert names(foreign, ERROR) == {"G08", "G27"}
    repair(foreign)
    assert read_gguf_header(foreign).get("step35.rope.dimension_count") == 32
    assert names(foreign) == {"G17"}


@pytest.mark.parametrize(
    ("keys", "tensor", "words"),
    [
        ({"attention__key_length": 32}, None, "4 heads of 32 values"),
        ({}, "blk.0.ffn_gate.weight", "a tensor of its own"),
        ({"feed_forward_length": 2}, "blk.0.ffn_up.weight", "has 3 rows"),
    ],
)
def test_phi3_that_does_not_fit(foreign: Path, keys: dict[str, Any], tensor: str | None, words: str) -> None:
    renamed(foreign, "phi3", **keys)
    if tensor:
        with_tensor(foreign, tensor, 0, (4, 3), np.ones(12, np.float32).tobytes())
    assert words in only(foreign, "G28").detail
    assert only(foreign, "G28").mended_by is None


def test_phi3_that_fits(foreign: Path) -> None:
    renamed(foreign, "phi3", feed_forward_length=2)
    with_tensor(foreign, "blk.0.ffn_up.weight", 0, (4, 4), np.ones(16, np.float32).tobytes())
    assert names(foreign) == {"G17"}
    assert names(foreign, INFORMATION) == NORMAL - {"G25"}


def test_empty_arrays(foreign: Path) -> None:
    for key in (b"general.languages", b"tokenizer.ggml.merges"):
        with_entry(foreign, struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, 8, 0))
    found = {found.detail: found.changes for found in examine(foreign) if found.rule.name == "G32"}
    assert [bool(changes) for changes in found.values()] == [True, False]
    repair(foreign)
    assert "general.languages" not in read_gguf_header(foreign).metadata
    assert "tokenizer.ggml.merges" in read_gguf_header(foreign).metadata


def damaged(path: Path, old: bytes, new: bytes) -> Path:
    blob = path.read_bytes()
    assert old in blob
    path.write_bytes(blob.replace(old, new, 1))
    return path


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("G29", lambda path: damaged(path, struct.pack("<IQ", 0, 96), struct.pack("<IQ", 0, 128)), "expected"),
        ("G29", lambda path: change(path, entries={"general.alignment": 24}), "power of two"),
        (
            "G29",
            lambda path: damaged(path, b"\x0d\0\0\0\0\0\0\0output.weight", b"\x50\0\0\0\0\0\0\0output.weight"),
            "63",
        ),
        ("G31", lambda path: damaged(path, b"general.tags", b"llama.rope.f"), "twice"),
        ("G31", lambda path: damaged(path, b"blk.0.attn_norm.weight", b"\x00lk.0.attn_norm.weight"), ""),
        ("G31", lambda path: damaged(path, b"GGUF", b"GGML"), "begins with"),
    ],
)
def test_headers_that_no_reader_takes(foreign: Path, name: str, spoil: Break, words: str) -> None:
    if words == "twice":
        with_entry(foreign, struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 0))
    elif words == "":
        foreign.write_bytes(foreign.read_bytes()[:300])
    else:
        spoil(foreign)
    found = examine(foreign)
    assert [(item.rule.name, item.severity, item.mended_by) for item in found] == [(name, ERROR, None)]
    assert words in found[0].detail
    assert repair(foreign) == []


def test_adapters_and_disguised_models(foreign: Path) -> None:
    change(foreign, entries={"tokenizer.ggml.pre": "qwen2"})
    assert "qwen2's tokenizer" in only(foreign, "G38").detail
    change(foreign, entries={"tokenizer.ggml.pre": "llama-bpe", "general.type": "adapter"})
    assert "adapter for architecture llama" in only(foreign, "G38").detail


def test_the_command_prints_mends_and_exits(foreign: Path, record: Record, tmp_path: Path) -> None:
    change(foreign, entries={FACTOR: 4.0})
    run = CliRunner().invoke
    first = run(cli, ["doctor", str(foreign)])
    assert first.exit_code == 1
    assert "error G11" in first.output
    assert "--fix" in first.output
    assert "positions are interpolated a second time" in " ".join(first.output.split())
    fixed = run(cli, ["doctor", str(foreign), "--fix"])
    assert fixed.exit_code == 0
    assert "mended: G11" in fixed.output
    assert "warning G17" in fixed.output
    assert run(cli, ["doctor", str(foreign), "--strict"]).exit_code == 1
    (tmp_path / "longrope.json").write_text(record().to_json())
    assert run(cli, ["doctor", str(foreign), "--scaling", str(tmp_path / "longrope.json")]).exit_code == 2
    last = run(
        cli, ["doctor", str(foreign), "--fix", "--strict", "--json", "--scaling", str(tmp_path / "longrope.json")]
    )
    assert last.exit_code == 0
    result = json.loads(last.output)
    assert [item["name"] for item in result["mended"]] == ["G17"]
    assert result["replaced"] == [str(foreign)]
    assert {item["severity"] for item in result["findings"]} == {INFORMATION}
    assert read_scaling(foreign) == record()


def test_a_folder_is_examined_file_by_file(foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "plain.gguf").unlink()
    (tmp_path / "b.gguf").write_bytes(foreign.read_bytes())
    change(tmp_path / "b.gguf", entries={FACTOR: 2.0})
    assert {(Path(item.path).name, item.rule.name) for item in examine(tmp_path) if item.severity == ERROR} == {
        ("b.gguf", "G11")
    }
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputFileError, match=r"neither config.json nor a .gguf file"):
        examine(tmp_path / "empty")
    with pytest.raises(InputFileError, match="does not exist"):
        examine(tmp_path / "nothing")


def test_the_documentation_has_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    for rule in (*GGUF_RULES.values(), *HF_RULES.values()):
        row = next(line for line in page.splitlines() if line.startswith((f"| {rule.name} |", f"| {rule.name} ● |")))
        assert row.split(" | ")[1:5] == [rule.severity, rule.condition, rule.runtimes, rule.symptom]
