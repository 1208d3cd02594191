"""`load`: from folders, GGUF files and memory; which record applies; what is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from longrope_export import RopeScaling, load
from longrope_export.errors import InputFileError, LongRopeError, ScalingError, UnsupportedModelError
from longrope_export.rotary import FixedRotary, rotary_module

WINDOW, LONGER, DIM = 32, 128, 32
LONG = tuple(1.0 + 3.0 * i / 15 for i in range(16))
SHORT = tuple(1.0 + 0.2 * i / 15 for i in range(16))
RECORD = RopeScaling(
    rope_theta=10000.0, rotary_dim=DIM, original_max_position_embeddings=WINDOW, max_position_embeddings=LONGER,
    long_factor=LONG, short_factor=SHORT, long_attention_factor=1.18, short_attention_factor=1.18,
)  # fmt: skip
IDS = torch.randint(3, 97, (1, 60), generator=torch.Generator().manual_seed(5))
LENGTHS = (20, WINDOW, WINDOW + 1, 60)


def changed(**changes: Any) -> RopeScaling:
    return RopeScaling.from_dict({**RECORD.to_dict(), **changes})


STATIC = changed(short_factor=list(LONG))


@torch.no_grad()
def logits(model: Any, length: int = 60) -> Tensor:
    result: Tensor = model(input_ids=IDS[:, :length], use_cache=False).logits[0]
    return result


def stock(folder: Path, record: RopeScaling) -> Any:
    """Transformers' own longrope with the folder's weights."""
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = record.max_position_embeddings
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": record.rope_theta, "factor": record.factor,
        "long_factor": list(record.long_factor), "short_factor": list(record.short_factor),
        "attention_factor": record.long_attention_factor,
        "original_max_position_embeddings": record.original_max_position_embeddings,
    }  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(folder, config=config)


def assert_equal_to_stock(model: Any, folder: Path, record: RopeScaling, tolerance: float = 1e-4) -> None:
    expected = stock(folder, record)
    for length in LENGTHS:
        assert (logits(model, length) - logits(expected, length)).abs().max() <= tolerance


@pytest.fixture(scope="module")
def record_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "longrope.json"
    path.write_text(RECORD.to_json())
    return path


def test_folder_with_a_record_object_or_file(tiny_llama: Path, record_file: Path) -> None:
    assert_equal_to_stock(load(tiny_llama, RECORD), tiny_llama, RECORD)
    assert_equal_to_stock(load(str(tiny_llama), str(record_file)), tiny_llama, RECORD)


def test_model_in_memory_and_a_second_record(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert load(model, RECORD) is model
    assert_equal_to_stock(model, tiny_llama, RECORD)
    assert load(model, STATIC) is model
    assert_equal_to_stock(model, tiny_llama, STATIC)
    load(model, RECORD)
    assert_equal_to_stock(model, tiny_llama, RECORD)


def test_nothing_carried_leaves_the_model_as_it_is(tiny_llama: Path) -> None:
    model = load(tiny_llama)
    assert type(rotary_module(model)).__name__ == "LlamaRotaryEmbedding"
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(tiny_llama)))
    with pytest.raises(ScalingError, match="carries none"):
        load(tiny_llama, switch="long")


def test_from_pretrained_options_reach_transformers(tiny_llama: Path) -> None:
    model = load(tiny_llama, RECORD, dtype=torch.bfloat16, attn_implementation="eager")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "eager"
    with pytest.raises(LongRopeError, match="dtype"):
        load(model, RECORD, dtype=torch.float32)


# angles and switch


def test_float32_angles_are_stock_bit_for_bit(tiny_llama: Path) -> None:
    ours, exact, expected = (
        load(tiny_llama, RECORD, angles="float32"),
        load(tiny_llama, RECORD, angles="exact"),
        stock(tiny_llama, RECORD),
    )
    for length in LENGTHS:
        assert torch.equal(logits(ours, length), logits(expected, length))
    lengths = []
    rotary = rotary_module(ours)
    rotary.register_forward_hook(lambda module, args, result: lengths.append(result))
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :40] = 0
    with torch.no_grad():  # one row long, one short: each cos as if it were alone
        ours(input_ids=IDS.expand(2, -1), attention_mask=mask, use_cache=False)
        for row, positions in ((0, torch.arange(60)), (1, torch.arange(20))):
            alone = expected.model.rotary_emb(torch.zeros(1), positions[None])
            for together, one in zip(lengths[-1], alone):
                assert torch.equal(together[row, -len(positions) :], one[0])
    assert not torch.equal(logits(exact), logits(expected))


def test_angles_reach_the_far_positions(tiny_llama: Path) -> None:
    far = torch.arange(2_000_000, 2_000_060)[None]
    with torch.no_grad():
        for angles, moved in (("exact", 1e-3), ("float32", math.inf)):
            model = load(tiny_llama, RECORD, angles=angles, switch="long")
            shift = (model(input_ids=IDS, position_ids=far, use_cache=False).logits[0] - logits(model)).abs().max()
            assert shift <= moved
    assert shift > 0.1


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"switch": "short"}, "short"),
        ({"switch": "long"}, "long"),
        ({"switch": "context", "context": WINDOW}, "short"),
        ({"switch": "context", "context": WINDOW + 1}, "long"),
    ],
)
def test_fixed_sets_from_the_first_token(tiny_llama: Path, options: dict[str, Any], kind: str) -> None:
    model = load(tiny_llama, RECORD, **options)
    factors = list(LONG if kind == "long" else SHORT)
    expected = stock(tiny_llama, changed(long_factor=factors, short_factor=factors))
    for length in LENGTHS:
        assert (logits(model, length) - logits(expected, length)).abs().max() <= 1e-4
    cached = model.generate(IDS[:, :28], max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, expected.generate(IDS[:, :28], max_new_tokens=8, do_sample=False, use_cache=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"switch": "sometimes"}, "switch"),
        ({"switch": "context"}, "context"),
        ({"context": 64}, "context"),
        ({"switch": "context", "context": 0}, "context"),
        ({"angles": "float16"}, "angles"),
    ],
)
def test_options_are_checked_before_anything_is_read(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScalingError, match=message):
        load("/does/not/exist", **options)


def test_a_static_record_needs_no_bookkeeping(tiny_llama: Path) -> None:
    model, expected = load(tiny_llama, STATIC), stock(tiny_llama, STATIC)
    prompt, options = IDS[:, :28], {"max_new_tokens": 12, "do_sample": False}
    wanted = expected.generate(prompt, use_cache=False, **options)
    assert torch.equal(model.generate(prompt, **options), wanted)
    assert torch.equal(model.generate(prompt, prompt_lookup_num_tokens=3, **options), wanted)
    assert torch.equal(model.generate(prompt, assistant_model=copy.deepcopy(model), **options), wanted)
    static = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(model.generate(prompt, past_key_values=static, **options), wanted)
    assert not model.model._forward_pre_hooks
    assert load(model, RECORD).model._forward_pre_hooks


# what is carried


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gemma3_text"])
def test_saved_models_carry_the_record(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    options: dict[str, Any] = {} if model_type == "phi3" else {"head_dim": DIM}
    if model_type == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}
        options |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    config = AutoConfig.for_model(
        model_type, vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, eos_token_id=None,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.15, max_position_embeddings=WINDOW,
        rope_parameters=rope, pad_token_id=0, **options,
    )  # fmt: skip
    record = changed(long_start_tokens=4, provenance={"method": "test"})
    model = load(AutoModelForCausalLM.from_config(config).eval(), record)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert RopeScaling.from_dict(again.config.longrope_export) == record
    for length in LENGTHS:
        assert torch.equal(logits(again, length), logits(model, length))
    # Stock transformers reads the same file as longrope; only n̂ is beyond it.
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(plain, WINDOW) - logits(model, WINDOW)).abs().max() <= 1e-4
    assert (logits(plain, 60) - logits(model, 60)).abs().max() > 0.01
    assert load(model).config.longrope_export == record.to_dict()


def test_longrope_config_without_our_key(tiny_llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    stock(tiny_llama, RECORD).save_pretrained(folder)
    model = load(folder)
    assert isinstance(rotary_module(model), FixedRotary)
    assert_equal_to_stock(model, tiny_llama, RECORD)


# errors


def copied(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config}))
    return target


def test_paths_that_are_no_models(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(InputFileError, match="does not exist"):
        load("gpt2")
    with pytest.raises(InputFileError, match=r"config\.json"):
        load(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    with pytest.raises(InputFileError, match=r"notes\.txt .*GGUF"):
        load(text)
    adapter = copied(tiny_llama, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(InputFileError, match="adapter"):
        load(adapter)
    truncated = copied(tiny_llama, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputFileError, match=r"model\.safetensors"):
        load(truncated)


def test_weights_that_do_not_fit_the_config(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(InputFileError, match=r"9 weights are missing.*layers\.2"):
        load(copied(tiny_llama, tmp_path / "deeper", num_hidden_layers=3))
    with pytest.raises(InputFileError, match=r"6 weights are of another shape.*layers\.0\.mlp"):
        load(copied(tiny_llama, tmp_path / "wider", intermediate_size=256))


def test_pickled_weights_are_never_opened(tmp_path: Path, tiny_llama: Path) -> None:
    folder = copied(tiny_llama, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputFileError, match=r"no \.safetensors"):
        load(folder)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(InputFileError, match="pickle"):
        load(folder)


def test_code_in_the_folder_is_never_run(tmp_path: Path, tiny_llama: Path) -> None:
    ran = tmp_path / "ran"
    folder = copied(tiny_llama, tmp_path / "remote", auto_map={"AutoModelForCausalLM": "evil.Evil"})
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(LongRopeError, match="trust_remote_code"):
        load(folder, RECORD, trust_remote_code=True)
    load(folder, RECORD)
    unknown = copied(folder, tmp_path / "unknown", model_type="evil")
    with pytest.raises(UnsupportedModelError, match="evil"):
        load(unknown, RECORD)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (changed(rotary_dim=30, long_factor=[2.0] * 15, short_factor=[1.0] * 15), "15 factors"),
        (changed(rope_theta=500000.0), "rope_theta 500000"),
    ],
)
def test_records_for_another_model(tiny_llama: Path, record: RopeScaling, message: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    before = logits(model)
    with pytest.raises(ScalingError, match=message):
        load(model, record)
    assert torch.equal(logits(model), before)


def test_records_are_checked_before_the_weights_are_read(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(ScalingError, match="rope_theta"):
        load(tiny_llama, changed(rope_theta=20000.0))
    with pytest.raises(AssertionError):
        load(tiny_llama, RECORD)


# GGUF


def write_gguf(model: Any, path: Path, architecture: str = "llama", **tensors: Any) -> gguf.GGUFWriter:
    """A GGUF of a tiny Llama in F32, with transformers' rows of q and k in llama.cpp's order; not closed yet."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_context_length(WINDOW)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(DIM)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        array = value.numpy()
        if ".q_proj." in name or ".k_proj." in name:
            array = array.reshape(-1, 2, DIM // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(target, np.ascontiguousarray(array))
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", np.array(values, dtype=np.float32))
    return writer


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def llama(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


def test_gguf_without_scaling(llama: Any, tmp_path: Path) -> None:
    close(write_gguf(llama, tmp_path / "model.gguf"))
    model = load(tmp_path / "model.gguf")
    assert (logits(model) - logits(llama)).abs().max() <= 1e-5
    assert not getattr(model, "is_quantized", False)
    assert model.dtype == torch.float32


def test_gguf_with_long_and_short_factors(llama: Any, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = write_gguf(llama, path, rope_factors_long=LONG, rope_factors_short=SHORT)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(24)
    writer.add_rope_scaling_attn_factors(1.18)
    close(writer)
    carried = changed(original_max_position_embeddings=24, max_position_embeddings=WINDOW)
    assert_equal_to_stock(load(path), tiny_llama, carried)
    assert_equal_to_stock(load(path, RECORD), tiny_llama, RECORD)


@pytest.mark.parametrize("switch", ["sequence", "short", "long"])
def test_gguf_with_llama_3_frequencies(llama: Any, tiny_llama: Path, tmp_path: Path, switch: Any) -> None:
    path = tmp_path / "model.gguf"
    close(write_gguf(llama, path, rope_freqs=LONG))
    model = load(path, switch=switch)
    expected = stock(tiny_llama, changed(short_factor=list(LONG), long_attention_factor=1.0))
    for length in LENGTHS:
        assert (logits(model, length) - logits(expected, length)).abs().max() <= 1e-4


def test_gguf_with_linear_scaling(llama: Any, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = write_gguf(llama, path)
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(2.0)
    close(writer)
    twos = [2.0] * 16
    expected = stock(tiny_llama, changed(long_factor=twos, short_factor=twos, long_attention_factor=1.0))
    assert (logits(load(path)) - logits(expected)).abs().max() <= 1e-4


def test_gguf_architectures_that_transformers_cannot_import(llama: Any, tmp_path: Path) -> None:
    close(write_gguf(llama, tmp_path / "model.gguf", architecture="internlm2"))
    with pytest.raises(UnsupportedModelError, match=r"internlm2.*cannot import"):
        load(tmp_path / "model.gguf", RECORD)


@pytest.mark.slow
def test_smollm2(smollm2: Path) -> None:
    record = RopeScaling(
        rope_theta=100000.0, rotary_dim=64, original_max_position_embeddings=8192,
        max_position_embeddings=16384, long_factor=(2.0,) * 32,
    )  # fmt: skip
    model = load(smollm2, record, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    assert (logits(model) - logits(plain)).abs().max() <= 1e-3
    record = RopeScaling.from_dict({**record.to_dict(), "original_max_position_embeddings": 50})
    assert (logits(load(model, record)) - logits(plain)).abs().max() > 0.1
