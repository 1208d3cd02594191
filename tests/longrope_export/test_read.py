"""`longrope read`: the record from every kind of file, and sources that disagree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter
from safetensors.numpy import save_file

from longrope_export.cli.main import main
from longrope_export.errors import InputFileError
from longrope_export.formats.records import SAFETENSORS_KEY, read_scaling
from longrope_export.scaling import RopeScaling

RECORD = RopeScaling(
    rope_theta=50000.0,
    rotary_dim=8,
    original_max_position_embeddings=32,
    max_position_embeddings=128,
    long_factor=(1.0, 1.1, 2.2, 4.0),
    short_factor=(1.0, 1.0, 1.0, 1.05),
    long_attention_factor=1.1,
    short_attention_factor=1.1,
    long_start_tokens=4,
    sets={64: (1.0, 1.0, 1.5, 2.0)},
    provenance={"method": "test", "seed": 3},
)


def write_json(folder: Path, record: RopeScaling = RECORD) -> Path:
    path = folder / "longrope.json"
    path.write_text(record.to_json())
    return path


def write_config(folder: Path, record: RopeScaling = RECORD, *, own: bool = True, **rope: Any) -> Path:
    values: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_attention_heads": 2,
        "max_position_embeddings": record.max_position_embeddings,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": record.rope_theta,
            "original_max_position_embeddings": record.original_max_position_embeddings,
            "attention_factor": record.long_attention_factor,
            "long_factor": list(record.long_factor),
            "short_factor": list(record.short_factor),
            **rope,
        },
    }
    path = folder / "config.json"
    path.write_text(json.dumps({**values, "longrope_export": record.to_dict()} if own else values))
    return path


def write_safetensors(folder: Path, record: RopeScaling = RECORD) -> Path:
    path = folder / "model.safetensors"
    save_file({"a": np.zeros(3, np.float32)}, path, metadata={"format": "pt", SAFETENSORS_KEY: record.to_json()})
    return path


def write_gguf(folder: Path, record: RopeScaling = RECORD, *, own: bool = True) -> Path:
    path = folder / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.context_length", record.max_position_embeddings)
    writer.add_uint32("llama.rope.scaling.original_context_length", record.original_max_position_embeddings)
    writer.add_float32("llama.rope.freq_base", record.rope_theta)
    writer.add_float32("llama.rope.scaling.attn_factor", record.long_attention_factor)
    writer.add_string("llama.rope.scaling.type", "longrope")
    if own:
        writer.add_string("longrope_export.scaling", record.to_json())
    writer.add_tensor("rope_factors_long.weight", np.array(record.long_factor, np.float32))
    writer.add_tensor("rope_factors_short.weight", np.array(record.short_factor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


WRITERS: dict[str, Callable[..., Path]] = {
    "longrope.json": write_json,
    "config.json": write_config,
    "model.safetensors": write_safetensors,
    "model.gguf": write_gguf,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_record(name: str, tmp_path: Path) -> None:
    path = WRITERS[name](tmp_path)
    assert read_scaling(path) == RECORD
    assert read_scaling(str(tmp_path)) == RECORD, "the folder that holds only this file"


def test_a_folder_with_agreeing_sources_gives_the_whole_record(tmp_path: Path) -> None:
    for writer in WRITERS.values():
        writer(tmp_path)
    assert read_scaling(tmp_path) == RECORD
    write_gguf(tmp_path, own=False)
    write_config(tmp_path, own=False)
    assert read_scaling(tmp_path) == RECORD, "what a runtime reads need not hold the start tokens"


def test_files_without_our_record_give_what_runtimes_read(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    plain: dict[str, Any] = {"long_start_tokens": 0, "sets": {}, "provenance": {}}
    for path in (write_gguf(tmp_path, own=False), write_config(tmp_path / "a", own=False)):
        found = read_scaling(path)
        assert replace(found, provenance={}) == replace(RECORD, **plain)


OTHER = replace(RECORD, long_factor=(1.0, 1.1, 2.2, 3.9))


@pytest.mark.parametrize("name", WRITERS)
def test_sources_that_disagree_are_named(name: str, tmp_path: Path) -> None:
    for other_name, writer in WRITERS.items():
        writer(tmp_path, OTHER if other_name == name else RECORD)
    with pytest.raises(InputFileError, match=r"disagree in long_factor;") as caught:
        read_scaling(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert str(caught.value).count(str(tmp_path)) == 2


@pytest.mark.parametrize("change", [{"long_start_tokens": 8}, {"short_attention_factor": 1.0}, {"sets": {}}])
def test_records_that_disagree_beyond_what_runtimes_read_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path)
    write_safetensors(tmp_path, replace(RECORD, **change))
    with pytest.raises(InputFileError, match=r"longrope\.json and .*model\.safetensors carry different records"):
        read_scaling(tmp_path)


def test_another_provenance_is_no_disagreement(tmp_path: Path) -> None:
    write_json(tmp_path)
    write_safetensors(tmp_path, RECORD.with_provenance(note="copied"))
    assert read_scaling(tmp_path) == RECORD


def test_files_without_a_record_are_named(tmp_path: Path, smollm2: Path, tiny_llama: Path) -> None:
    for path in (smollm2, tiny_llama, tiny_llama / "config.json", tiny_llama / "model.safetensors"):
        with pytest.raises(InputFileError, match="carries no longrope scaling; see `longrope describe"):
            read_scaling(path)
    with pytest.raises(InputFileError, match="does not exist"):
        read_scaling(tmp_path / "absent.json")
    with pytest.raises(InputFileError, match="carries no longrope scaling"):
        read_scaling(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("longrope.json", b"{", "not valid JSON"),
        ("longrope.json", b'{"format": "longrope-export/9"}', "has format 'longrope-export/9'"),
        ("longrope.json", RECORD.to_json().encode().replace(b"4.0\n", b"0.0\n"), "greater than 0"),
        ("longrope.json", RECORD.to_json().encode().replace(b"4.0\n", b"NaN\n"), "holds NaN"),
        ("longrope.json", b"\xff\xfe", "not valid JSON"),
        ("config.json", b'{"model_type": "llama", "rope_parameters": 3}', "rope_parameters is 3"),
        ("model.gguf", b"GGUF", "truncated"),
        ("other", b"GGUF", "truncated"),
        ("model.gguf", b"PK\x03\x04", "begins with"),
        ("model.safetensors", bytes(20), "does not begin"),
        ("model.bin", b"\x80\x02", "not valid JSON"),
    ],
)
def test_malformed_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=message) as caught:
        read_scaling(path)
    assert str(path) in str(caught.value)


def test_a_malformed_record_in_safetensors_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": np.zeros(1, np.float32)}, path, metadata={SAFETENSORS_KEY: "{}"})
    with pytest.raises(InputFileError, match=r"model\.safetensors: the scaling record has format None"):
        read_scaling(path)


def test_a_record_that_contradicts_its_config_names_the_file(tmp_path: Path) -> None:
    path = write_config(tmp_path, attention_factor=1.0)
    with pytest.raises(InputFileError, match=r"config\.json.* disagree in long_attention_factor"):
        read_scaling(path)


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("name", WRITERS)
def test_the_json_output_is_a_record_again(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = WRITERS[name](tmp_path)
    assert RopeScaling.from_json(run("read", str(path), "--json", capsys=capsys)) == RECORD


def test_the_table_shows_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = run("read", str(write_json(tmp_path)), capsys=capsys)
    expected = ("32 → 128 tokens (× 4)", "4 values, 1 … 4", "factor 1.1 long", "4 long, 0 short")
    for part in (*expected, "set up to 64", 'method: "test"', "theta 50,000"):
        assert part in table


def test_the_command_fails_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["read", str(tmp_path / "absent")])
    output = capsys.readouterr()
    assert (caught.value.code, output.out, output.err.count("\n")) == (1, "", 1)
