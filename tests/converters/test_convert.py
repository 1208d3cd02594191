"""`convert_to_gguf`: a real llama.cpp computes what transformers computes, and tokenizes as transformers does."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longrope_export import RopeScaling
from longrope_export.converters.gguf.convert import convert_to_gguf
from longrope_export.converters.gguf.patch import patch_gguf
from longrope_export.converters.gguf.tokenizer import read_tokenizer
from longrope_export.converters.gguf.weights import permute_pairs
from longrope_export.converters.hf_folder import write_hf_folder
from longrope_export.errors import (
    InputFileError,
    LossyTargetError,
    NumericalError,
    OutputError,
    ScalingError,
    UnsupportedModelError,
)
from longrope_export.formats.gguf_header import read_gguf_header
from longrope_export.formats.gguf_tensors import read_tensor
from longrope_export.formats.pre_tokenizers import (
    PRE_TOKENIZERS,
    pre_tokenizer_json,
    pre_tokenizer_name,
)
from longrope_export.formats.records import read_scaling
from longrope_export.runtimes import llamacpp

Record = Callable[..., RopeScaling]
BOUND = 1e-3  # nats, F32 against F32


pytestmark = pytest.mark.usefixtures("quiet")


def prompt(length: int) -> list[int]:
    generator = random.Random(length)
    return [generator.randrange(2, 600) for _ in range(length)]


def distance(gguf: Path, folder: Path, length: int, context: int) -> float:
    """Largest difference of a next-token log-probability between llama.cpp and transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    ours = llamacpp.next_token_probabilities(gguf, [prompt(length)], context=context)[0]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([prompt(length)])).logits[0, -1]
    return float(np.abs(ours - logits.log_softmax(-1).numpy()).max())


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def copy(small_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_llama, tmp_path / "copy"))


def test_plain_model_equals_transformers(small_llama: Path, tmp_path: Path) -> None:
    assert convert_to_gguf(small_llama, tmp_path / "m.gguf", dtype="f32") == []
    assert distance(tmp_path / "m.gguf", small_llama, 300, 512) < BOUND


def test_factors_equal_transformers_below_and_above_the_switch(
    small_llama: Path, record: Record, tmp_path: Path
) -> None:
    scaling = record(32)
    write_hf_folder(small_llama, tmp_path / "hf", scaling)
    convert_to_gguf(small_llama, tmp_path / "m.gguf", scaling, dtype="f32")
    assert distance(tmp_path / "m.gguf", tmp_path / "hf", 300, 512) < BOUND
    assert distance(tmp_path / "m.gguf", tmp_path / "hf", 700, 1024) < BOUND
    assert distance(tmp_path / "m.gguf", small_llama, 300, 512) > 100 * BOUND
    assert read_scaling(tmp_path / "m.gguf") == scaling


def test_biases_tied_embeddings_and_llama3_scaling_equal_transformers(
    small_config: dict[str, Any], digit_tokenizer: Any, record: Record, tmp_path: Path
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    llama3 = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    config = LlamaConfig(
        **small_config, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=llama3
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "hf")
    digit_tokenizer.save_pretrained(tmp_path / "hf")
    convert_to_gguf(tmp_path / "hf", tmp_path / "m.gguf", dtype="f32")
    header = read_gguf_header(tmp_path / "m.gguf")
    assert header.tensor("output.weight") is None
    assert distance(tmp_path / "m.gguf", tmp_path / "hf", 300, 512) < BOUND

    own = read_tensor(header, "rope_freqs.weight")
    assert own.max() == 8.0
    composed = record(32, short_factor=own.tolist(), long_factor=(own * 1.5).tolist())
    patch_gguf(tmp_path / "m.gguf", tmp_path / "patched.gguf", composed)
    write_hf_folder(tmp_path / "hf", tmp_path / "extended", composed)
    assert distance(tmp_path / "patched.gguf", tmp_path / "extended", 700, 1024) < BOUND


def test_patching_a_conversion_equals_converting_with_the_record(
    small_llama: Path, record: Record, tmp_path: Path
) -> None:
    convert_to_gguf(small_llama, tmp_path / "plain.gguf", dtype="q8_0")
    convert_to_gguf(small_llama, tmp_path / "direct.gguf", record(32), dtype="q8_0")
    patch_gguf(tmp_path / "plain.gguf", tmp_path / "patched.gguf", record(32))
    patch_gguf(tmp_path / "direct.gguf", tmp_path / "again.gguf", record(32))
    assert (tmp_path / "patched.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()


def test_a_record_in_config_json_is_taken(small_llama: Path, record: Record, tmp_path: Path) -> None:
    write_hf_folder(small_llama, tmp_path / "hf", record(32))
    convert_to_gguf(tmp_path / "hf", tmp_path / "m.gguf")
    assert read_scaling(tmp_path / "m.gguf") == record(32)


def test_permutation_is_the_one_of_the_rotation() -> None:
    """Rotating pairs (2i, 2i + 1) of the permuted head equals permuting the head rotated in pairs (i, i + d/2)."""
    heads, size = 3, 8
    head = np.random.default_rng(0).standard_normal((heads * size, 1)).astype(np.float32)
    angles = np.linspace(0.1, 2.0, size // 2)
    split = head.reshape(heads, 2, size // 2)
    turned = np.stack(
        [
            split[:, 0] * np.cos(angles) - split[:, 1] * np.sin(angles),
            split[:, 1] * np.cos(angles) + split[:, 0] * np.sin(angles),
        ],
        axis=1,
    ).reshape(-1, 1)
    pairs = permute_pairs(head, heads).reshape(heads, size // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    norm = np.stack(
        [even * np.cos(angles) - odd * np.sin(angles), odd * np.cos(angles) + even * np.sin(angles)], axis=-1
    )
    np.testing.assert_allclose(permute_pairs(turned, heads).reshape(norm.shape), norm, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "matrix", "file_type", "error"),
    [("f32", 0, 0, 0.0), ("f16", 1, 1, 5e-4), ("bf16", 30, 32, 4e-3), ("q8_0", 8, 7, 5e-3)],
)
def test_dtypes(small_llama: Path, tmp_path: Path, dtype: str, matrix: int, file_type: int, error: float) -> None:
    from safetensors.numpy import load_file

    convert_to_gguf(small_llama, tmp_path / "m.gguf", dtype=dtype)
    header = read_gguf_header(tmp_path / "m.gguf")
    assert header.get("general.file_type") == file_type
    assert {info.ggml_type for info in header.tensors if len(info.shape) == 1} == {0}
    assert {info.ggml_type for info in header.tensors if len(info.shape) == 2} == {matrix}
    source = load_file(small_llama / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    found = np.abs(read_tensor(header, "blk.0.ffn_up.weight") - source).max()
    assert found <= error
    assert error == 0.0 or found > error / 100


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_sources_keep_their_values(small_llama: Path, tmp_path: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small_llama, dtype=getattr(torch, dtype))
    shutil.copytree(small_llama, tmp_path / "half")
    model.save_pretrained(tmp_path / "half")
    convert_to_gguf(tmp_path / "half", tmp_path / "m.gguf", dtype="f32")
    stored = read_tensor(read_gguf_header(tmp_path / "m.gguf"), "output.weight")
    assert np.array_equal(stored, model.lm_head.weight.float().detach().numpy())


def test_float16_overflow_is_refused_and_short_rows_fall_back(copy: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(NumericalError, match=r"blk.1.ffn_up.weight has values beyond float16"):
        convert_to_gguf(copy, tmp_path / "m.gguf", dtype="f16")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    convert_to_gguf(copy, tmp_path / "m.gguf", dtype="bf16")


def test_options_and_existing_output(small_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="'q4_k' is not written"):
        convert_to_gguf(small_llama, tmp_path / "m.gguf", dtype="q4_k")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        convert_to_gguf(small_llama, tmp_path / "m.gguf")
    convert_to_gguf(small_llama, tmp_path / "m.gguf", overwrite=True)
    assert read_gguf_header(tmp_path / "m.gguf").get("general.name") == "llama"


def test_peak_memory_stays_near_the_largest_tensor(copy: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    hidden, middle, layers = 1024, 2048, 5
    edit_config(
        copy, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    shapes = {"model.embed_tokens": (608, hidden), "model.norm": (hidden,)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"model.layers.{layer}.mlp.{name}_proj": (middle, hidden) for name in ("up", "gate")}
        shapes |= {f"model.layers.{layer}.{name}_layernorm": (hidden,) for name in ("input", "post_attention")}
        shapes[f"model.layers.{layer}.mlp.down_proj"] = (hidden, middle)
    tensors = {f"{name}.weight": np.zeros(shape, np.float32) for name, shape in shapes.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, copy / "model.safetensors")
    child = (
        "import sys\nfrom longrope_export.converters.gguf.convert import convert_to_gguf\n"
        "def peak():\n"
        "    lines = dict(line.split(':') for line in open('/proc/self/status') if ':' in line)\n"
        "    return int(lines['VmHWM'].split()[0]) * 1024\n"
        "import gguf; before = peak()\n"
        "convert_to_gguf(sys.argv[1], sys.argv[2], dtype='bf16'); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", child, str(copy), str(tmp_path / "m.gguf")],
        check=True, capture_output=True, text=True, env={**os.environ},
    )  # fmt: skip
    assert total > 200e6
    assert int(done.stdout) < 10 * 4 * hidden * middle


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_llama_cpp_tokenizes_alike_with_every_known_pre_tokenizer(
    small_llama: Path, tmp_path: Path, corpus: list[str], name: str
) -> None:
    from tokenizers import Tokenizer

    shutil.copytree(small_llama, tmp_path / "model")
    values = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    values["pre_tokenizer"] = pre_tokenizer_json(name)
    values["model"]["ignore_merges"] = PRE_TOKENIZERS[name].ignore_merges
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(values))
    convert_to_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert read_gguf_header(tmp_path / "m.gguf").get("tokenizer.ggml.pre") == name
    tokenizer = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in corpus]
    assert llamacpp.tokenize(tmp_path / "m.gguf", corpus) == expected


def test_llama_cpp_tokenizes_smollm2_alike(smollm2: Path, corpus: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from longrope_export.converters.gguf.dequantise import _correct_tokenizer

    AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name).save_pretrained(tmp_path)
    wrong = AutoTokenizer.from_pretrained(tmp_path)
    _correct_tokenizer(read_gguf_header(smollm2), tmp_path)
    right = AutoTokenizer.from_pretrained(tmp_path)
    expected = llamacpp.tokenize(smollm2, corpus)
    assert right(corpus)["input_ids"] == expected
    assert wrong(corpus)["input_ids"] != expected


def sentencepiece_like(folder: Path, normalizer: Any, pre_tokenizer: Any) -> None:
    """A tokenizer.json as made from a SentencePiece BPE: every way to make a piece is a merge, in order of scores."""
    from tokenizers import Tokenizer, models, trainers

    text = "a small dog and the old dog run over the land, and the sand is cold as the land is old " * 5
    base = Tokenizer(models.BPE())
    base.train_from_iterator([text.replace(" ", "▁")], trainers.BpeTrainer(vocab_size=200, show_progress=False))
    learned = sorted(base.get_vocab(), key=base.get_vocab().__getitem__)
    pieces = [piece for piece in learned if len(piece) > 1]
    singles = [piece for piece in learned if len(piece) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *singles]
    known = {*pieces, *singles}
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    special = [
        {"id": index, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for index, token in enumerate(tokens[:3])
    ]  # fmt: skip
    values = {
        "version": "1.0", "added_tokens": special, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer,
        "post_processor": None, "decoder": None,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
            "vocab": {token: index for index, token in enumerate(tokens)}, "merges": merges,
        },
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(values))


LLAMA2 = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(("normalizer", "splitter", "losses"), [(LLAMA2, None, 0), (None, METASPACE, 1)])
def test_sentencepiece_tokenizers_are_alike(
    copy: Path, tmp_path: Path, normalizer: Any, splitter: Any, losses: int
) -> None:
    from tokenizers import Tokenizer

    sentencepiece_like(copy, normalizer, splitter)
    texts = ["the old dog", "and  the land, isn't 日本 cold\n\tas sand", "aaaa ddd oldold", "runrun the", "a "]
    texts += [] if losses else [" leading", "  the"]
    assert len(convert_to_gguf(copy, tmp_path / "m.gguf")) == losses
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert len(expected[0]) < 6
    assert llamacpp.tokenize(tmp_path / "m.gguf", texts) == expected


def edit_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer Whitespace has no known"),
        (lambda values: values["pre_tokenizer"]["pretokenizers"].pop(), "Sequence.Digits. has no known counterpart"),
        (lambda values: values["pre_tokenizer"]["pretokenizers"][0].update(individual_digits=False), "no known"),
        (lambda values: values["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), "no known"),
        (lambda values: values["model"].update(ignore_merges=True), "'smollm' but has ignore_merges True"),
        (lambda values: values.update(normalizer={"type": "Lowercase"}), "has a normalizer"),
        (lambda values: values["model"].update(type="Unigram"), "is not a BPE tokenizer"),
        (lambda values: values["model"].update(dropout=0.1), "uses dropout"),
        (lambda values: values["model"].update(end_of_word_suffix="</w>"), "suffixes"),
    ],
)  # fmt: skip
def test_tokenizers_that_llama_cpp_would_apply_differently_are_refused(
    copy: Path, tmp_path: Path, change: Any, message: str
) -> None:
    edit_tokenizer(copy, change)
    with pytest.raises(UnsupportedModelError, match=message):
        convert_to_gguf(copy, tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["model"]["merges"].pop(), "a way to make"),
        (lambda values: values["model"]["merges"].append(values["model"]["merges"][0]), "are apart"),
        (lambda values: values.update(normalizer={"type": "NFKC"}), "handles spaces in a way"),
        (lambda values: values.update(pre_tokenizer={**METASPACE, "split": True}, normalizer=None), "handles spaces"),
    ],
)  # fmt: skip
def test_byte_fallback_tokenizers_that_are_not_sentencepiece_are_refused(
    copy: Path, tmp_path: Path, change: Any, message: str
) -> None:
    sentencepiece_like(copy, LLAMA2, None)
    edit_tokenizer(copy, change)
    with pytest.raises(UnsupportedModelError, match=message):
        convert_to_gguf(copy, tmp_path / "m.gguf")


def test_every_name_is_found_again() -> None:
    for name, row in PRE_TOKENIZERS.items():
        assert pre_tokenizer_name(pre_tokenizer_json(name), ignore_merges=row.ignore_merges) == name


def test_special_tokens_template_and_unused_rows(copy: Path) -> None:
    templates = [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "T"}]
    settings = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": templates}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    single = [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]
    processor = {"type": "Sequence", "processors": [{"type": "TemplateProcessing", "single": single}]}
    edit_tokenizer(copy, lambda values: values.update(post_processor=processor))
    found = read_tokenizer(copy, 608, {"pad_token_id": 1, "eos_token_id": [5]})
    assert dict(found.special) == {"bos": 0, "eos": 1, "pad": 1}
    assert (found.add_bos, found.add_eos, found.chat_template) == (True, False, "T")
    assert found.types[:2] == [3, 3]
    assert (found.tokens[600], found.types[600], len(found.tokens)) == ("[PAD600]", 5, 608)
    (copy / "chat_template.jinja").write_text("J")
    (copy / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    found = read_tokenizer(copy, 608, {"eos_token_id": [5]})
    assert (dict(found.special), found.add_bos, found.chat_template) == ({"eos": 5}, False, "J")


def test_bad_token_ids_are_refused(copy: Path) -> None:
    with pytest.raises(InputFileError, match="the model has 599 embeddings"):
        read_tokenizer(copy, 599, {})
    edit_tokenizer(copy, lambda values: values["model"]["vocab"].update(extra=7))
    with pytest.raises(InputFileError, match="the id 7 belongs to"):
        read_tokenizer(copy, 608, {})
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputFileError, match=r"has no tokenizer.json"):
        read_tokenizer(copy, 608, {})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "qwen3"}, UnsupportedModelError, "qwen3 is not converted here, only llama, mistral, qwen2"),
        ({"hidden_act": "gelu"}, UnsupportedModelError, "hidden_act is 'gelu'"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModelError, "rotates whole heads"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, UnsupportedModelError, "dynamic NTK"),
        ({"num_hidden_layers": 4}, InputFileError, "says 4 layers, but there are"),
        ({"num_hidden_layers": 2**16}, InputFileError, "says 65,536 layers, but there are"),
        ({"vocab_size": 2**31 - 1}, InputFileError, r"config.json says .2147483647, 128"),
        ({"num_hidden_layers": 1}, UnsupportedModelError, "model.layers.1.* has no place"),
        ({"intermediate_size": 161}, InputFileError, "shape .* config.json says .128, 161"),
        ({"num_key_value_heads": 4}, InputFileError, "config.json says .128, 128"),
        ({"num_attention_heads": "4"}, InputFileError, "num_attention_heads is '4'"),
        ({"model_type": "mistral", "sliding_window": 64}, LossyTargetError, "not to a sliding window of 64"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_converted_are_refused(
    copy: Path, tmp_path: Path, changes: Any, error: Any, message: str
) -> None:
    edit_config(copy, **changes)
    with pytest.raises(error, match=message):
        convert_to_gguf(copy, tmp_path / "m.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    if error is LossyTargetError:
        assert len(convert_to_gguf(copy, tmp_path / "m.gguf", allow_lossy=True)) == 1


def test_null_means_what_transformers_takes_it_for(copy: Path, tmp_path: Path) -> None:
    """A null sliding window is none, and null key-value heads are as many as there are heads."""
    edit_config(copy, model_type="mistral", sliding_window=None)
    assert convert_to_gguf(copy, tmp_path / "m.gguf") == []
    edit_config(copy, num_key_value_heads=None)
    with pytest.raises(InputFileError, match=r"attn_k.* config.json says .128, 128"):
        convert_to_gguf(copy, tmp_path / "n.gguf")


def test_a_layer_without_weights_is_named(copy: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputFileError, match=r"the weights lack blk\.1\.ffn_up"):
        convert_to_gguf(copy, tmp_path / "m.gguf")


def test_a_chat_template_that_is_no_text_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(InputFileError, match=r"chat_template\.jinja is not UTF-8"):
        convert_to_gguf(copy, tmp_path / "m.gguf")


def test_records_of_other_models_are_refused(small_llama: Path, record: Record, tmp_path: Path) -> None:
    with pytest.raises(ScalingError, match="has 8 factors, the model needs 16"):
        convert_to_gguf(small_llama, tmp_path / "m.gguf", record(16))
    with pytest.raises(LossyTargetError, match="n̂ = 4"):
        convert_to_gguf(small_llama, tmp_path / "m.gguf", record(32, long_start_tokens=4))
