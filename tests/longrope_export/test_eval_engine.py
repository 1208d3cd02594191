"""The engine of transformers: chunks against one forward, bounded memory, positions far out, greedy generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from longrope_export import RopeScaling, load
from longrope_export.description import describe
from longrope_export.errors import NumericalError, TextTooShortError, UnsupportedModelError
from longrope_export.evaluation.engine import TransformersEngine
from longrope_export.evaluation.prefill import AUTOMATIC_ABOVE, AUTOMATIC_CHUNK, chunk_for, growing_cache, state_chunks
from longrope_export.evaluation.rows import FactorSet, ModelRow

VOCABULARY = 97
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"head_dim": 32, "sliding_window": 12},
}


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.15, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **FAMILIES[family],
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def ids(length: int, seed: int = 0) -> npt.NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, VOCABULARY, length)


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk", [7, 16, 49, 50])
def test_losses_in_chunks_are_those_of_one_forward(family: str, chunk: int) -> None:
    model = random_model(family)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids(50))[None], use_cache=False).logits[0].double()
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(ids(50))[1:], reduction="none")
    engine = TransformersEngine(model, prefill_chunk=chunk)
    np.testing.assert_allclose(engine.losses(ids(50)), expected.numpy(), rtol=0, atol=2e-5)
    np.testing.assert_allclose(engine.losses(ids(50), first=20), expected.numpy()[19:], rtol=0, atol=2e-5)
    assert engine.choices(ids(50), first=20).tolist() == logits[19:-1].argmax(-1).tolist()


def calls_of(module: Any, call: Any) -> list[int]:
    """Tokens of every call of `module`."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2]))
    try:
        call()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize(("asked", "expected"), [(None, [50]), (0, [50]), (64, [50]), (20, [20, 20, 10])])
def test_the_prefill_chunk_is_what_was_asked_for(model: Any, asked: int | None, expected: list[int]) -> None:
    engine = TransformersEngine(model, prefill_chunk=asked)
    engine.losses(ids(3))
    assert calls_of(model.model.layers[0].mlp, lambda: engine.losses(ids(50))) == expected


def test_long_rows_are_chunked_by_themselves() -> None:
    assert chunk_for(AUTOMATIC_ABOVE, None) == AUTOMATIC_ABOVE
    assert chunk_for(AUTOMATIC_ABOVE + 1, None) == AUTOMATIC_CHUNK
    assert chunk_for(AUTOMATIC_ABOVE + 1, 0) == AUTOMATIC_ABOVE + 1


def test_lm_head_runs_on_what_is_scored_only(model: Any) -> None:
    engine = TransformersEngine(model, prefill_chunk=16)
    engine.losses(ids(3))
    assert sum(calls_of(model.lm_head, lambda: engine.losses(ids(50), first=45))) == 5
    assert sum(calls_of(model.lm_head, lambda: engine.losses(ids(50)))) == 49
    assert sum(calls_of(model.lm_head, lambda: engine.choices(ids(50), 48))) == 2


def test_the_cache_is_one_block_that_is_never_copied(model: Any) -> None:
    cache = growing_cache(model, 60)
    places: list[int] = []
    with torch.no_grad():
        for _ in state_chunks(model, torch.from_numpy(ids(50))[None], 10, cache=cache):
            places.append(cache.layers[1].keys.data_ptr())
    assert len(places) == 5
    assert len(set(places)) == 1
    assert cache.get_seq_length() == 50


def test_no_tensor_grows_with_length_times_hidden_or_vocabulary() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model, made = random_model("llama"), []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            if isinstance(output, Tensor) and not output._is_view():
                made.append(output.numel())
            return output

    engine = TransformersEngine(model, prefill_chunk=8)
    engine.losses(ids(3))
    with Record():
        engine.losses(ids(200))
    # The largest: the cache of a layer, keys or values, or an 8 × 200 mask with a value a head and key.
    assert max(made) <= 200 * 32 * 2


def test_far_positions_differ_only_by_float_noise_and_start_tokens_by_more(tiny_llama: Path) -> None:
    record = RopeScaling(
        rope_theta=10000.0, rotary_dim=32, original_max_position_embeddings=32, max_position_embeddings=1 << 22,
        long_factor=tuple(np.linspace(1, 64, 16)), long_start_tokens=24,
    )  # fmt: skip
    engine = TransformersEngine(load(tiny_llama))
    row = ModelRow("far", describe(tiny_llama), "record", record, 64)
    engine.rotate(row, row.factor_set(1 << 20), 64)
    near, far = engine.losses(ids(64)), [engine.losses(ids(64), offset=offset) for offset in (1_044_480, 2_093_056)]
    np.testing.assert_allclose(far[0], far[1], rtol=0, atol=2e-4)
    assert np.abs(near - far[0]).max() > 1e-3, "positions below the start tokens have other angles"
    chunked = TransformersEngine(engine.model, prefill_chunk=10).losses(ids(64), offset=2_093_056)
    np.testing.assert_allclose(chunked, far[1], rtol=0, atol=2e-5)


def test_the_rotation_is_exchanged_and_taken_back(tiny_llama: Path) -> None:
    engine = TransformersEngine(load(tiny_llama))
    row = ModelRow("any", describe(tiny_llama), "unchanged", None, 64)
    plain = engine.losses(ids(40))
    slow = FactorSet("slow", tuple(np.linspace(1, 8, 16)), 1.2)
    engine.rotate(row, slow, 40)
    first = engine.losses(ids(40))
    engine.rotate(row, FactorSet("other", (2.0,) * 16), 40)
    engine.rotate(row, slow, 40)
    np.testing.assert_array_equal(engine.losses(ids(40)), first)
    assert np.abs(first - plain).max() > 1e-2
    engine.rotate(row, FactorSet("own"), 40)
    np.testing.assert_array_equal(engine.losses(ids(40)), plain)


@pytest.mark.parametrize("chunk", [None, 9])
def test_generation_is_greedy_and_ends_before_eos(model: Any, chunk: int | None) -> None:
    prompt = ids(30, seed=3)
    stock = model.generate(
        torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, 30, dtype=torch.long),
        generation_config=GenerationConfig(do_sample=False, max_new_tokens=12, pad_token_id=0, eos_token_id=None),
    )[0, 30:].tolist()  # fmt: skip
    engine = TransformersEngine(model, prefill_chunk=chunk)
    ends = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = None
        assert engine.generate(prompt.tolist(), 12) == stock
        model.generation_config.eos_token_id = [stock[5]]
        assert engine.generate(prompt.tolist(), 12) == stock[: stock.index(stock[5])]
    finally:
        model.generation_config.eos_token_id = ends


@pytest.fixture
def spoiled() -> TransformersEngine:
    model = random_model("llama")
    engine = TransformersEngine(model, prefill_chunk=16)
    engine.losses(ids(3))

    def spoil(module: Any, args: Any, output: Tensor) -> None:
        if output.shape[1] == 16:
            output[0, 6] = float("nan")

    model.model.norm.register_forward_hook(spoil)
    return engine


def test_nan_is_named_with_its_token(spoiled: TransformersEngine) -> None:
    with pytest.raises(NumericalError, match="loss at token 8; try"):
        spoiled.losses(ids(20))
    with pytest.raises(NumericalError, match="NaN or infinite logits"):
        spoiled.choices(ids(20), 5)


def test_token_ids_that_the_model_does_not_know_are_refused(model: Any) -> None:
    engine = TransformersEngine(model)
    with pytest.raises(UnsupportedModelError, match="id 97 and the model knows 97 tokens"):
        engine.losses([1, 97, 5])
    with pytest.raises(UnsupportedModelError):
        engine.choices([1, -1, 5], 1)
    with pytest.raises(TextTooShortError, match="at least 2"):
        engine.losses([1])


def test_a_chunk_sees_the_cache_without_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from longrope_export.evaluation import prefill_attention

    model = random_model("llama")
    masks: list[bool] = []
    own = prefill_attention._attention

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        masks.append(mask is not None)
        return own(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(prefill_attention, "_attention", attention)
    prefill_attention._register.cache_clear()
    try:
        TransformersEngine(model, prefill_chunk=10).losses(ids(50))
    finally:
        monkeypatch.undo()
        prefill_attention._register.cache_clear()
        prefill_attention._register()
    assert masks == [False] * 10
    assert model.config._attn_implementation == "sdpa"
