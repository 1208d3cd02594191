"""The chunked loss against the plain one: values, gradients, and the size of every tensor on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_families import tiny_family
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from longrope_export.errors import UnsupportedModelError
from longrope_export.evaluation.losses import state_losses_and_gradients
from longrope_export.training.loss import CHUNK_VALUES, chunk_rows, loss_backend, loss_sum, summed_loss

VOCABULARY, CHUNK = 97, 5


def batch(rows: int = 2, length: int = 13) -> tuple[Tensor, Tensor]:
    """Ids and labels shifted within each row; the last label of a row and a few others do not count."""
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = torch.cat([ids[:, 1:], torch.full((rows, 1), -100)], dim=1)
    labels[0, 2:4] = -100
    return ids, labels


def plain_gradients(model: nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits.double()
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    return loss.detach(), gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad()
    return found


def our_gradients(
    model: nn.Module, ids: Tensor, labels: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor | None]]:
    model.zero_grad()
    with summed_loss(model, chunk=CHUNK):
        found = model(input_ids=ids, labels=labels, **options)
    loss = found.total / found.count
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(ours: dict[str, Tensor | None], plain: dict[str, Tensor | None]) -> None:
    for name, gradient in plain.items():
        if gradient is None:
            assert ours[name] is None, name
        else:
            assert gradient.abs().max() > 1e-4, f"{name} has no gradient: the test is empty"
            torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5)


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "scaled": ("granite", {"logits_scaling": 4.0}),
    "capped": ("gemma2", {"final_logit_softcapping": 2.0, "tie_word_embeddings": True}),
    "multiplied": ("cohere", {"logit_scale": 0.25}),
}


@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_the_plain_ones(head: str) -> None:
    model_type, changes = HEADS[head]
    model = tiny_family(model_type, **changes).float()
    ids, labels = batch()
    expected, plain = plain_gradients(model, ids, labels)
    loss, ours = our_gradients(model, ids, labels, position_ids=torch.arange(13)[None])
    assert abs(loss - expected) < 1e-5
    assert_same(ours, plain)


def test_a_frozen_head_gets_no_gradient_and_gives_the_body_the_same_one() -> None:
    model = tiny_family("llama").float()
    model.lm_head.requires_grad_(False)
    ids, labels = batch()
    _, plain = plain_gradients(model, ids, labels)
    _, ours = our_gradients(model, ids, labels)
    assert ours["lm_head.weight"] is None
    assert_same(ours, plain)


def test_recomputed_layers_give_the_same_gradients() -> None:
    model = tiny_family("llama").float()
    ids, labels = batch()
    _, plain = plain_gradients(model, ids, labels)
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    _, ours = our_gradients(model, ids, labels)
    assert_same(ours, plain)


def test_mixed_precision_reaches_a_trained_head() -> None:
    model = tiny_family("llama", tie_word_embeddings=True).float()
    ids, labels = batch()
    _, plain = plain_gradients(model, ids, labels)
    with torch.autocast("cpu", torch.bfloat16):
        _, ours = our_gradients(model, ids, labels)
    for name, gradient in plain.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - gradient).norm() < 0.03 * gradient.norm(), name


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    model = tiny_family("llama").float()
    ids, labels = batch()
    _, plain = plain_gradients(model, ids, labels)
    count = int((labels != -100).sum())
    with summed_loss(model, chunk=CHUNK):
        parts = [model(input_ids=ids[row : row + 1], labels=labels[row : row + 1]) for row in range(2)]
    assert [int(part.count) for part in parts] == [10, 12]
    for part in parts:
        (part.total / count).backward()
    assert_same(gradients(model), plain)


def test_labels_that_do_not_count_change_nothing() -> None:
    model = tiny_family("llama").float()
    ids, labels = batch()
    with summed_loss(model, chunk=CHUNK):
        nothing = model(input_ids=ids, labels=torch.full_like(labels, -100))
    nothing.total.backward()
    assert (nothing.total.item(), nothing.count.item()) == (0.0, 0)
    assert all(gradient is not None and not gradient.any() for gradient in gradients(model).values())
    with torch.no_grad(), summed_loss(model, chunk=CHUNK):
        measured = model(input_ids=ids, labels=labels)
    expected, _ = plain_gradients(model, ids, labels)
    assert abs(measured.total / measured.count - expected) < 1e-5


def created(call: Callable[[], object]) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            shapes.extend(
                tuple(each.shape)
                for each in (output if isinstance(output, tuple) else (output,))
                if isinstance(each, Tensor)
            )
            return output

    with Record():
        call()
    return shapes


@pytest.mark.parametrize("trained", [True, False])
def test_no_tensor_of_length_times_vocabulary_in_either_pass(trained: bool) -> None:
    model = tiny_family("llama").float()
    model.lm_head.requires_grad_(trained)
    ids, labels = batch(1, 40)

    def rows(call: Callable[[], object]) -> int:
        """The most positions that any tensor holds a vocabulary for."""
        values = (
            torch.Size(shape).numel() // VOCABULARY for shape in created(call) if shape and shape[-1] == VOCABULARY
        )
        # lm_head's own matrix, transposed, is as wide as the vocabulary too.
        return max(value for value in values if value != model.config.hidden_size)

    assert rows(lambda: our_gradients(model, ids, labels)) == CHUNK
    assert rows(lambda: plain_gradients(model, ids, labels)) == 40, "the measuring does not see the full logits"


def test_a_chunk_is_as_long_as_its_logits_are_small() -> None:
    model = tiny_family("llama")
    assert chunk_rows(model) == CHUNK_VALUES // VOCABULARY
    model.lm_head = nn.Linear(1, CHUNK_VALUES // 100, bias=False)
    assert chunk_rows(model) == 100
    model.lm_head = nn.Linear(1, CHUNK_VALUES // 10, bias=False)
    assert chunk_rows(model) == 64


def test_the_heads_gradient_is_summed_in_float32() -> None:
    model = tiny_family("llama").bfloat16()
    states = torch.randn(300, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.zeros(300, dtype=torch.int64)
    weights = [model.lm_head.weight]
    _, _, (whole,) = state_losses_and_gradients(model, states, targets, weights, chunk=300)
    _, _, (pieces,) = state_losses_and_gradients(model, states, targets, weights, chunk=1)
    # One rounding at the end is 2^-9; sums in bfloat16 would be off by several per cent.
    assert whole.dtype == torch.bfloat16
    assert (pieces - whole).norm() / whole.norm() < 0.005


def test_a_likely_tokens_gradient_survives_bfloat16() -> None:
    model = tiny_family("llama").bfloat16()
    with torch.no_grad():
        model.lm_head.weight.zero_()[7, 0] = 12.0
    states = torch.eye(1, 48).bfloat16()
    _, gradient, _ = state_losses_and_gradients(model, states, torch.tensor([7]))
    missing = (VOCABULARY - 1) / (VOCABULARY - 1 + math.exp(12))
    assert gradient[0, 0].item() == pytest.approx(-12 * missing, rel=0.01)


def test_the_loss_can_be_differentiated_once() -> None:
    model = tiny_family("llama").float()
    states, labels = torch.randn(4, 48, requires_grad=True), torch.arange(4)
    total = loss_sum(model, states, labels).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        total.backward()


def test_the_models_own_forward_is_back_afterwards() -> None:
    model = tiny_family("llama").float()
    ids, labels = batch()
    with summed_loss(model):
        inside = model(input_ids=ids, use_cache=False).logits
    assert "forward" not in model.__dict__
    assert torch.equal(inside, model(input_ids=ids, use_cache=False).logits)
    assert model(input_ids=ids, labels=labels, use_cache=False).loss is not None


def test_a_head_that_is_not_understood_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family("llama").float()
    plain = type(model).forward

    def doubled(self: Any, *args: Any, **options: Any) -> Any:
        output = plain(self, *args, **options)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(type(model), "forward", doubled)
    with pytest.raises(UnsupportedModelError, match="changes its logits"), summed_loss(model):
        pass


def test_dropout_is_not_taken_for_an_unknown_head() -> None:
    model = tiny_family("llama", attention_dropout=0.9).float().train()
    model.lm_head.eval()
    with summed_loss(model):
        assert model.model.layers[0].training
    assert not model.lm_head.training


def test_ligers_kernel_is_chosen_where_it_exists_and_can_express_the_head() -> None:
    model, scaled = tiny_family("llama"), tiny_family("granite", logits_scaling=4.0)
    assert loss_backend(model, "cuda", has_liger=True) == "liger"
    assert loss_backend(tiny_family("gemma2", final_logit_softcapping=2.0), "cuda", has_liger=True) == "liger"
    for odd, device, found in ((model, "cpu", True), (model, "cuda", False), (scaled, "cuda", True)):
        assert loss_backend(odd, device, has_liger=found) == "chunks"
    model.lm_head = nn.Sequential(model.lm_head)
    assert loss_backend(model, "cuda", has_liger=True) == "chunks"
