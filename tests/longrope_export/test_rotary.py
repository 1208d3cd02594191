"""The rotary embedding: exact angles, transformers' bits, gradients, one set a row, and every family."""

from __future__ import annotations

import copy
import math
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from longrope_export.errors import ScalingError, UnsupportedModelError
from longrope_export.families import FAMILIES
from longrope_export.rope.methods import method_factors
from longrope_export.rotary import (
    FixedRotary,
    LayerTypeRotary,
    decoder_of,
    fixed_rotary,
    inverse_frequencies_of,
    replace_rotary,
    rotary_dim_of,
    rotary_module,
    rotation,
)

FAR = 2_097_152
WINDOW = 32


def frequencies(dimension: int, theta: float = 10000.0, factors: Tensor | None = None, angles: Any = "exact") -> Tensor:
    return inverse_frequencies_of(torch.ones(dimension // 2) if factors is None else factors, theta, angles)


def true_cos_and_sin(position: int, dimension: int, theta: float) -> list[tuple[float, float]]:
    with mpmath.workdps(50):
        angles = [position * mpmath.mpf(theta) ** (-mpmath.mpf(2 * i) / dimension) for i in range(dimension // 2)]
        return [(float(mpmath.cos(angle)), float(mpmath.sin(angle))) for angle in angles]


@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1234567.0])
def test_exact_angles_at_two_million_tokens(theta: float) -> None:
    for position in (1, FAR - 1, FAR):
        cos, sin = rotation(torch.tensor([[position]]), frequencies(128, theta), attention_factor=1.0)
        assert cos.dtype == sin.dtype == torch.float32
        expected = torch.tensor(true_cos_and_sin(position, 128, theta), dtype=torch.float64)
        for half in (slice(None, 64), slice(64, None)):
            assert (cos[0, 0, half].double() - expected[:, 0]).abs().max() <= 1e-6
            assert (sin[0, 0, half].double() - expected[:, 1]).abs().max() <= 1e-6


def test_float32_angles_are_rounded_to_an_eighth_of_a_radian_there() -> None:
    positions = torch.tensor([[FAR - 1]])
    in_float32 = frequencies(128, angles="float32")
    angle = float((positions.float() * in_float32)[0, 1])
    assert 2**20 < angle < 2**21  # where neighbouring float32 numbers are 1/8 apart
    assert angle % 0.125 == 0.0
    cos, _ = rotation(positions, in_float32, attention_factor=1.0, angles="float32")
    expected = torch.tensor(true_cos_and_sin(FAR - 1, 128, 10000.0))[:, 0]
    assert (cos[0, 0, :64] - expected).abs().max() > 0.01


def test_float32_frequencies_spoil_exact_products() -> None:
    spoilt = frequencies(128).float().double()
    cos, _ = rotation(torch.tensor([[FAR]]), spoilt, attention_factor=1.0)
    exact, _ = rotation(torch.tensor([[FAR]]), frequencies(128), attention_factor=1.0)
    assert (cos - exact).abs().max() > 1e-3


ROPES: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {
        "rope_type": "longrope",
        "attention_factor": 1.1832,
        "original_max_position_embeddings": WINDOW,
        "factor": 4.0,
    },
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("dimension", [32, 64, 80, 128])
def test_float32_is_transformers_bit_for_bit(rope: dict[str, Any], theta: float, dimension: int) -> None:
    generator = torch.Generator().manual_seed(dimension)
    long, short = (1 + 7 * torch.rand(dimension // 2, generator=generator) for _ in range(2))
    scaled = rope["rope_type"] == "longrope"
    lists = {"long_factor": long.tolist(), "short_factor": short.tolist()} if scaled else {}
    config = LlamaConfig(
        hidden_size=2 * dimension, num_attention_heads=2, head_dim=dimension, max_position_embeddings=128,
        rope_parameters={**rope, **lists, "rope_theta": theta},
    )  # fmt: skip
    stock = LlamaRotaryEmbedding(config)
    ours = FixedRotary(theta, dimension, angles="float32")
    for last, factors in ((WINDOW, short), (5000, long)):
        if scaled:
            ours.set_factors(factors, 1.1832)
        positions = torch.arange(last)[None]
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.zeros(1, dtype=dtype)
            assert all(torch.equal(*both) for both in zip(stock(x, positions), ours(x, positions)))
    if scaled:
        ours.set_factors(factors, 1.1833)
        assert not torch.equal(stock(x.float(), positions)[0], ours(x.float(), positions)[0])


@pytest.mark.parametrize("angles", ["exact", "float32"])
def test_yarn_as_factors(angles: Any) -> None:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_parameters=yarn,
    )
    found = method_factors(
        "yarn",
        rope_theta=10000.0,
        rotary_dim=64,
        original_max_position_embeddings=512,
        max_position_embeddings=2048,
    )
    ours = FixedRotary(10000.0, 64, angles=angles)
    ours.set_factors(torch.tensor(found.factors), found.attention_factor)
    x, positions = torch.zeros(1), torch.arange(64)[None]
    for stock, own in zip(LlamaRotaryEmbedding(config)(x, positions), ours(x, positions)):
        assert (stock - own).abs().max() <= 2e-5


@pytest.mark.parametrize("angles", ["exact", "float32"])
@pytest.mark.parametrize("rows", [None, 3])
def test_gradients_of_frequencies_and_attention_factor(angles: Any, rows: int | None) -> None:
    shape = (16,) if rows is None else (rows, 16)
    positions = torch.randint(0, 300, (3, 7), generator=torch.Generator().manual_seed(0))
    real = torch.float64 if angles == "exact" else torch.float32
    inverse = (0.01 + torch.rand(shape, generator=torch.Generator().manual_seed(1))).to(real).requires_grad_()
    attention = torch.tensor(1.2, requires_grad=True)
    cos, _ = rotation(positions, inverse, attention_factor=attention, angles=angles)
    cos[..., :16].sum().backward()
    assert inverse.grad is not None
    assert attention.grad is not None
    wide = inverse.detach().double() if rows is None else inverse.detach().double()[:, None]
    phases = positions[..., None] * wide
    expected = -1.2 * positions[..., None] * phases.sin()
    expected = expected.sum((0, 1)) if rows is None else expected.sum(1)
    assert torch.allclose(inverse.grad.double(), expected, rtol=1e-3, atol=1e-2)
    assert math.isclose(attention.grad.item(), phases.cos().sum().item(), rel_tol=1e-3)


def test_a_set_for_each_row() -> None:
    positions = torch.arange(40)[None].expand(2, -1)
    inverse = torch.stack([frequencies(32), frequencies(32, factors=torch.full((16,), 3.0))])
    attention, start = torch.tensor([1.0, 1.3]), torch.tensor([0, 8])
    together = rotation(
        positions,
        inverse,
        attention_factor=attention,
        start_tokens=start,
        original_inverse_frequencies=inverse[0],
    )
    for row in range(2):
        one = rotation(
            positions[:1], inverse[row], attention_factor=float(attention[row].double()),
            start_tokens=int(start[row]), original_inverse_frequencies=inverse[0],
        )  # fmt: skip
        for whole, part in zip(together, one):
            assert torch.equal(whole[row], part[0])
    assert not torch.equal(together[0][0, 1:], together[0][1, 1:])


@pytest.mark.parametrize("angles", ["exact", "float32"])
def test_start_tokens_keep_the_original_frequencies(angles: Any) -> None:
    positions = torch.arange(20)[None]
    original = frequencies(32, angles=angles)
    scaled = frequencies(32, factors=torch.full((16,), 4.0), angles=angles)
    kept, _ = rotation(
        positions,
        scaled,
        attention_factor=1.1,
        start_tokens=8,
        original_inverse_frequencies=original,
        angles=angles,
    )
    plain, far = (rotation(positions, each, attention_factor=1.1, angles=angles)[0] for each in (original, scaled))
    assert torch.equal(kept[:, :8], plain[:, :8])
    assert torch.equal(kept[:, 8:], far[:, 8:])
    assert (plain[:, 7:9] - far[:, 7:9]).abs().amax((0, 2)).min() > 0.1
    with pytest.raises(ScalingError, match="original_inverse_frequencies"):
        rotation(positions, scaled, attention_factor=1.0, start_tokens=8)


# In models.

ROTARY_DIM = {"phi3": 24}


def build(model_type: str, rope: dict[str, Any] | None = None, weights: Any = None) -> Any:
    torch.manual_seed(0)
    rope = rope or {"rope_type": "default", "rope_theta": 10000.0}
    options: dict[str, Any] = {"head_dim": 32}
    if model_type == "phi3":  # 8 of 32 values a head are not rotated
        options = {"original_max_position_embeddings": WINDOW}
        rope = {**rope, "partial_rotary_factor": 0.75}
    if model_type == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}
    if model_type in ("gemma2", "gemma3_text"):
        options |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
    config = AutoConfig.for_model(
        model_type, vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.15, max_position_embeddings=128,
        rope_parameters=rope, bos_token_id=1, eos_token_id=None, pad_token_id=0, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    if weights is not None:
        model.load_state_dict(weights.state_dict())
    return model


def longrope(factors: Tensor) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": factors.tolist(), "factor": 4.0,
        "short_factor": factors.tolist(), "attention_factor": 1.2, "original_max_position_embeddings": WINDOW,
    }  # fmt: skip


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


IDS = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(3))
TYPES = sorted({row.model_types[0] for row in FAMILIES.values()})


@pytest.mark.parametrize("model_type", TYPES)
def test_every_family_equals_stock_longrope(model_type: str) -> None:
    plain = build(model_type)
    assert rotary_dim_of(plain) == ROTARY_DIM.get(model_type, 32)
    factors = 1 + 3 * torch.linspace(0, 1, rotary_dim_of(plain) // 2)
    stock = build(model_type, longrope(factors), weights=plain)
    before = logits(plain, IDS)
    rotary = fixed_rotary(plain, angles="float32")
    assert torch.equal(logits(plain, IDS), before)
    rotary.set_factors(factors, 1.2)
    assert torch.equal(logits(plain, IDS), logits(stock, IDS))
    assert (logits(plain, IDS) - before).abs().max() > 0.1
    rotary.set_factors(torch.stack([torch.ones_like(factors), factors]), torch.tensor([1.0, 1.2]))
    rows = logits(plain, IDS)
    assert (rows[0] - before[0]).abs().max() <= 1e-4
    assert (rows[1] - logits(stock, IDS)[1]).abs().max() <= 1e-4


def test_families_with_other_layers_keep_them() -> None:
    model = build("gemma3_text")
    stock = rotary_module(model)
    x, positions = torch.zeros(1), torch.arange(50)[None]
    fixed_rotary(model, angles="float32").set_factors(torch.full((16,), 3.0))
    first = rotary_module(model)
    assert isinstance(first, LayerTypeRotary)
    for layer_type, same in (("sliding_attention", True), ("full_attention", False)):
        assert torch.equal(first(x, positions, layer_type)[0], stock(x, positions, layer_type)[0]) is same
    fixed_rotary(model, angles="float32")
    second = rotary_module(model)
    assert torch.equal(second(x, positions, "sliding_attention")[0], stock(x, positions, "sliding_attention")[0])
    assert replace_rotary(model, stock) is second
    assert rotary_module(model) is stock


def test_decoder_without_its_head() -> None:
    model = build("llama")
    assert decoder_of(model) is decoder_of(model.model) is model.model


@pytest.mark.parametrize("model_type", ["gptj", "olmo2", "phimoe"])
def test_other_types_are_refused_by_name(model_type: str) -> None:
    model = nn.Module()
    model.config = AutoConfig.for_model(model_type)
    with pytest.raises(UnsupportedModelError, match=model_type):
        rotary_module(model)


def test_wrong_lengths_are_refused() -> None:
    model = build("llama")
    with pytest.raises(ScalingError, match="64"):
        replace_rotary(model, FixedRotary(10000.0, 64))
    rotary = fixed_rotary(model)
    for shape in ((15,), (1,), (1, 1, 16)):
        with pytest.raises(ScalingError, match="shape"):
            rotary.set_factors(torch.ones(shape))
    with pytest.raises(ScalingError, match="angles"):
        FixedRotary(10000.0, 32, angles="fast")  # type: ignore[arg-type]


def test_frequencies_survive_casts_copies_and_saving() -> None:
    model = build("llama")
    fixed_rotary(model).set_factors(torch.full((16,), 2.0), 1.1, 4)
    assert not [name for name in model.state_dict() if "rotary" in name]
    x, positions = torch.zeros(1), torch.tensor([[3, FAR]])
    before = rotary_module(model)(x, positions)
    twin = copy.deepcopy(model).to(torch.bfloat16)
    rotary_module(model).set_factors(torch.full((16,), 3.0))  # type: ignore[operator]
    assert all(torch.equal(*both) for both in zip(before, rotary_module(twin)(x, positions)))
    assert rotary_module(twin)(x.bfloat16(), positions)[0].dtype == torch.bfloat16
    gemma = build("gemma3_text")
    fixed_rotary(gemma)
    kept = rotary_module(gemma)(x, positions, "sliding_attention")[0]
    assert torch.equal(rotary_module(gemma.to(torch.bfloat16))(x, positions, "sliding_attention")[0], kept)
    stock = build("llama").to(torch.bfloat16)
    rounded = rotary_module(stock)(x, positions)[0][0, 1] - rotary_module(build("llama"))(x, positions)[0][0, 1]
    assert rounded.abs().max() > 0.5  # what the same cast does to transformers' own module


def test_loss_gradient_reaches_the_factors() -> None:
    model = build("llama").requires_grad_(False)
    rotary = fixed_rotary(model)
    attention = torch.tensor(1.1, requires_grad=True)
    factors = torch.full((16,), 1.5, dtype=torch.float64, requires_grad=True)

    def loss(factors: Tensor, attention: Tensor) -> Tensor:
        rotary.set_factors(factors, attention)
        result: Tensor = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        return result

    loss(factors, attention).backward()
    assert factors.grad is not None
    assert attention.grad is not None
    pair, step = int(factors.grad.abs().argmax()), 1e-2
    with torch.no_grad():
        shifted = torch.zeros(16, dtype=torch.float64).index_fill_(0, torch.tensor(pair), step)
        slope = (loss(factors + shifted, attention) - loss(factors - shifted, attention)) / (2 * step)
        by_attention = (loss(factors, attention + step) - loss(factors, attention - step)) / (2 * step)
    assert math.isclose(float(factors.grad[pair]), float(slope), rel_tol=0.05)
    assert math.isclose(float(attention.grad), float(by_attention), rel_tol=0.05)
