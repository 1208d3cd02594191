"""What is trained, by name; what a step moves; and the plain model that a merge gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, tiny_family
from torch import Tensor, nn
from trained_models import logits, tiny, trained_for

from longrope_export.errors import LongRopeError
from longrope_export.training.parameters import (
    LoraOptions,
    embedding_and_norms,
    is_tied,
    linear_layers,
    make_trainable,
    merge,
    target_names,
    trained_weights,
)


def moved(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}


def test_full_trains_every_weight_and_nothing_is_wrapped() -> None:
    model = tiny().requires_grad_(False)
    assert make_trainable(model, "full") is model
    assert moved(model, trained_for(model)) == {name for name, _ in model.named_parameters()}
    assert merge(model) is model


def test_lora_trains_its_two_matrices_in_each_target_and_nothing_else() -> None:
    model = make_trainable(tiny(), "lora", LoraOptions(rank=3, targets=("q_proj", "down_proj")))
    shapes = {name: tuple(weight.shape) for name, weight in trained_weights(model).items()}
    wide = {"self_attn.q_proj": (48, 48), "mlp.down_proj": (64, 48)}
    assert shapes == {
        f"base_model.model.model.layers.{layer}.{target}.lora_{matrix}.default.weight": shape
        for layer in range(2)
        for target, (inputs, outputs) in wide.items()
        for matrix, shape in (("A", (3, inputs)), ("B", (outputs, 3)))
    }
    assert moved(model, trained_for(model)) == set(shapes)


def test_lora_plus_trains_embedding_and_norms_too() -> None:
    model = make_trainable(tiny(), "lora-plus")
    copies = {name for name in trained_weights(model) if "modules_to_save" in name}
    norms = {f"layers.{layer}.{norm}" for layer in range(2) for norm in ("input_layernorm", "post_attention_layernorm")}
    modules = {"embed_tokens", "norm", *norms}
    assert copies == {f"base_model.model.model.{module}.modules_to_save.default.weight" for module in modules}
    changed = moved(model, trained_for(model))
    assert copies <= changed
    assert changed == set(trained_weights(model))


@pytest.mark.parametrize("train", ["lora", "lora-plus"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_merge_gives_a_plain_model_with_the_same_logits(train: Any, tied: bool) -> None:
    model = make_trainable(tiny(tie_word_embeddings=tied), train)
    before = logits(model)
    rope = dict(model.config.rope_parameters)
    trained_for(model)
    model.config.use_cache = False
    unmerged = logits(model)
    assert (unmerged - before).abs().max() > 0.05, "training changed nothing: the test is empty"
    assert is_tied(model) is tied
    plain = merge(model, use_cache=True)
    assert type(plain).__name__ == "LlamaForCausalLM"
    assert not any("lora" in name or "modules_to_save" in name for name in plain.state_dict())
    torch.testing.assert_close(logits(plain), unmerged, rtol=1e-5, atol=1e-5)
    assert is_tied(plain) is plain.config.tie_word_embeddings is tied
    assert plain.config.use_cache is True
    assert plain.config.rope_parameters == rope
    assert rope["long_factor"] == [1.0, 1.5, 2.0, 4.0]


def test_alpha_and_rank_scale_the_adapter() -> None:
    def change(rank: int, alpha: float) -> Tensor:
        model = make_trainable(tiny(), "lora", LoraOptions(rank=rank, alpha=alpha, targets=("q_proj",)))
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        base = layer.base_layer.weight.detach().clone()
        with torch.no_grad():
            for name, weight in trained_weights(model).items():
                weight.fill_(1.0 if "lora_A" in name else 0.5)
        return (merge(model).model.layers[0].self_attn.q_proj.weight - base).detach()

    # B·A is rank × 0.5 everywhere, times alpha / rank.
    torch.testing.assert_close(change(2, 6.0), torch.full((48, 48), 3.0))
    torch.testing.assert_close(change(4, 5.5), torch.full((48, 48), 2.75))


def test_dropout_runs_in_training_only() -> None:
    model = make_trainable(tiny(), "lora", LoraOptions(dropout=0.5))
    trained_for(model)
    assert torch.equal(logits(model.eval()), logits(model))
    torch.manual_seed(0)
    assert not torch.equal(logits(model.train()), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_attention_is_the_default_target(family: str) -> None:
    model = tiny_family(family)
    names = target_names(model)
    layers = linear_layers(model)
    attention = {kind for kind, full in layers.items() if ".self_attn." in full[0]}
    assert set(names) == attention
    assert {"norm", "embed_tokens", "input_layernorm"} <= set(embedding_and_norms(model))
    make_trainable(model, "lora-plus")


def test_all_linear_is_every_layer_of_the_decoder() -> None:
    assert set(target_names(tiny(), ("all-linear",))) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["query", "lm_head", "norm"])
def test_targets_that_do_not_exist_are_refused_with_those_that_do(wrong: str) -> None:
    with pytest.raises(LongRopeError) as caught:
        make_trainable(tiny(), "lora", LoraOptions(targets=("q_proj", wrong)))
    assert str(caught.value) == (
        f"LlamaForCausalLM has no linear layer {wrong} to adapt; "
        "it has q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
    )


def test_layers_outside_the_decoder_are_left_alone() -> None:
    model = tiny()
    model.tower = nn.ModuleDict({"q_proj": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    trained = trained_weights(make_trainable(model, "lora-plus"))
    assert len(trained) == 2 * 2 * 4 + 1 + 5
    assert not any("tower" in name for name in trained)


def test_a_merge_that_is_not_finite_is_refused() -> None:
    model = make_trainable(tiny(), "lora")
    with torch.no_grad():
        next(weight for name, weight in model.named_parameters() if "lora_B" in name).fill_(float("nan"))
    with pytest.raises(LongRopeError, match="cannot be merged"):
        merge(model)
