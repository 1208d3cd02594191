"""The objective against stock transformers, and its gradient against finite differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from longrope_export.errors import UnsupportedModelError
from longrope_export.rotary import rotary_module
from longrope_export.search.memory import CHUNK, activation_bytes, memory_plan
from longrope_export.search.objective import ModelObjective
from longrope_export.search.protocol import Trial
from longrope_export.search.space import Candidate, RopeNumbers, closed_form
from longrope_export.tolerances import SAME_LOSS

LONG = tuple(float(value) for value in np.linspace(1.0, 5.0, 16))


@pytest.fixture
def objective(tiny: Any) -> Any:
    made = ModelObjective(tiny.model, tiny.numbers, {"search": tiny.rows})
    yield made
    made.close()


def _stock_loss(folder: Path, row: Any, attention_factor: float) -> float:
    config: Any = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 128
    config.rope_parameters = {
        "rope_type": "longrope", "rope_theta": 10000.0, "long_factor": list(LONG), "short_factor": [1.0] * 16,
        "original_max_position_embeddings": 32, "factor": 4.0, "attention_factor": attention_factor,
    }  # fmt: skip
    model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    ids = torch.from_numpy(row)[None]
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("attention_factor", [1.0, 1.19])
def test_the_loss_is_stock_transformers_loss(
    tiny: Any, objective: ModelObjective, tiny_llama: Path, attention_factor: float
) -> None:
    ours = objective.measure(Trial(Candidate(LONG, attention_factor), "search", 1)).loss
    assert ours == pytest.approx(_stock_loss(tiny_llama, tiny.rows[1], attention_factor), abs=2e-6)


def test_every_part_of_a_candidate_changes_the_loss(tiny: Any, objective: ModelObjective) -> None:
    base = Candidate(LONG)
    others = [Candidate(LONG, 1.1), Candidate(LONG, 1.0, 8), Candidate((*LONG[:-1], 6.0)), Candidate((1.1, *LONG[1:]))]
    losses = [objective.measure(Trial(candidate, "search", 0)).loss for candidate in (base, *others, base)]
    assert len(set(losses)) == 5
    assert losses[0] == losses[-1]


def test_factors_that_the_model_has_already_are_kept(tiny: Any) -> None:
    numbers = RopeNumbers(
        rope_theta=10000.0, rotary_dim=32, window=32, target=128, base_factors=LONG, base_attention_factor=1.1
    )
    losses = []
    for each, candidate in ((numbers, numbers.unchanged()), (tiny.numbers, Candidate(LONG, 1.1))):
        objective = ModelObjective(tiny.model, each, {"search": tiny.rows})
        losses.append(objective.measure(Trial(candidate, "search", 0)).loss)
        objective.close()
    assert losses[0] == losses[1]


@pytest.mark.parametrize("start_tokens", [0, 8])
def test_the_gradient_is_the_finite_difference(tiny: Any, start_tokens: int) -> None:
    model = AutoModelForCausalLM.from_config(tiny.model.config).double()
    model.load_state_dict(tiny.model.state_dict())
    objective = ModelObjective(model, tiny.numbers, {"search": tiny.rows})
    at = np.log([*LONG, 1.1])
    outcome = objective.measure(Trial(_at(at, start_tokens), "search", 0, gradient=True))
    assert outcome.gradient is not None
    for index in (2, 4, 6, 10, 16):
        slope = _slope(objective, at, index, start_tokens)
        assert outcome.gradient[index] == pytest.approx(slope, rel=0.02, abs=1e-4)
    assert np.abs(outcome.gradient).max() > 5e-3


def _slope(objective: ModelObjective, at: Any, index: int, start_tokens: int = 0) -> float:
    """Central difference; logits are float32, so the step is not tiny."""
    step = np.zeros(17)
    step[index] = 5e-3
    trials = [Trial(_at(at + sign * step, start_tokens), "search", 0) for sign in (1, -1)]
    first, second = (objective.measure(trial).loss for trial in trials)
    return (first - second) / 1e-2


def _at(position: Any, start_tokens: int) -> Candidate:
    values = np.exp(position).tolist()
    return Candidate(tuple(values[:-1]), values[-1], start_tokens)


def test_the_gradient_s_loss_is_the_loss(objective: ModelObjective) -> None:
    plain, with_gradient = (objective.measure(Trial(Candidate(LONG), "search", 0, each)) for each in (False, True))
    assert with_gradient.loss == pytest.approx(plain.loss, abs=1e-6)
    assert plain.gradient is None


def test_recomputing_layers_changes_nothing_but_memory(tiny: Any) -> None:
    trial = Trial(Candidate(LONG), "search", 0, gradient=True)
    results, saved = [], []
    for recompute in (False, True):
        objective = ModelObjective(tiny.model, tiny.numbers, {"search": tiny.rows}, recompute=recompute)
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            results.append(objective.measure(trial))
        saved.append(total)
        assert not any(layer.training for layer in tiny.model.model.layers)
        objective.close()
    assert results[0] == results[1]
    assert saved[1] < 0.5 * saved[0]


def test_attention_is_not_computed_again_with_the_layers(tiny: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(function)
            Count.calls += name.startswith("aten._scaled_dot_product") and "backward" not in name
            return function(*args, **(kwargs or {}))

    objective = ModelObjective(tiny.model, tiny.numbers, {"search": tiny.rows}, recompute=True)
    with Count():
        objective.measure(Trial(Candidate(LONG), "search", 0, gradient=True))
    objective.close()
    assert Count.calls == len(tiny.model.model.layers)


def test_recomputing_is_chosen_by_the_memory_it_saves(tiny: Any) -> None:
    assert not ModelObjective(tiny.model, tiny.numbers, {"search": tiny.rows}).recompute
    assert activation_bytes(tiny.model, 128) == 2 * 128 * (16 * 64 + 4 * 128) * 4
    long = [np.zeros(1_000_000, dtype=np.int64)]
    assert ModelObjective(tiny.model, tiny.numbers, {"search": long}).recompute


def test_the_memory_plan_is_of_weights_and_passes(tiny: Any) -> None:
    kept, recomputed = (memory_plan(tiny.model, 100_000, recompute=each) for each in (False, True))
    assert kept.weights == {"cpu": sum(weight.numel() for weight in tiny.model.parameters()) * 4}
    assert kept.gradient > activation_bytes(tiny.model, 100_000) > recomputed.evaluation
    assert kept.evaluation == recomputed.evaluation < memory_plan(tiny.model, 200_000, recompute=True).evaluation
    assert recomputed.recomputed_layers


def test_logits_of_the_whole_row_never_exist(tiny: Any) -> None:
    row = np.random.default_rng(0).integers(3, 97, 3 * CHUNK)
    objective = ModelObjective(tiny.model, tiny.numbers, {"search": [row]})
    sizes = []
    hook = tiny.model.lm_head.register_forward_hook(lambda module, inputs, output: sizes.append(output.shape[-2]))
    for gradient in (False, True):
        objective.measure(Trial(Candidate(LONG), "search", 0, gradient))
    hook.remove()
    objective.close()
    assert max(sizes) == CHUNK
    assert sum(sizes) == 2 * (3 * CHUNK - 1)


def test_the_model_gets_its_rotary_embedding_back(tiny: Any) -> None:
    before = rotary_module(tiny.model)
    objective = ModelObjective(tiny.model, tiny.numbers, {"search": tiny.rows})
    assert rotary_module(tiny.model) is not before
    objective.close()
    assert rotary_module(tiny.model) is before


def test_a_loss_that_is_not_finite_is_infinite(tiny: Any, objective: ModelObjective) -> None:
    weight = tiny.model.lm_head.weight
    kept = weight[5, 5].item()
    with torch.no_grad():
        weight[5, 5] = float("nan")
    outcome = objective.measure(Trial(Candidate(LONG), "search", 0))
    with torch.no_grad():
        weight[5, 5] = kept
    assert outcome.loss == float("inf")


FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "phi3": {"original_max_position_embeddings": 32, "pad_token_id": 0},
    "granite": {"logits_scaling": 2.0},
    "gemma2": {"sliding_window": 4096, "query_pre_attn_scalar": 16},
    "gemma3_text": {
        "sliding_window": 16,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


def _family(tiny: Any, kind: str) -> ModelObjective:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=32, initializer_range=0.15, **FAMILIES[kind],
    )  # fmt: skip
    theta = 1e6 if kind == "gemma3_text" else 10000.0
    model = AutoModelForCausalLM.from_config(config).double()
    numbers = RopeNumbers(rope_theta=theta, rotary_dim=32, window=32, target=128)
    return ModelObjective(model, numbers, {"search": tiny.rows}, recompute=True)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_s_rows_have_their_own_set(tiny: Any, kind: str) -> None:
    objective = _family(tiny, kind)
    candidates = [Candidate(LONG, 1.1), Candidate(LONG, 1.3), Candidate(LONG, 1.1, 16), Candidate((1.5,) * 16, 1.1)]
    trials = tuple(Trial(candidate, "search", 0) for candidate in candidates)
    losses = [outcome.loss for outcome in objective.measure_rows(trials)]
    assert losses == pytest.approx([objective.measure(trial).loss for trial in trials], abs=SAME_LOSS)
    assert min(np.diff(sorted(losses))) > 2 * SAME_LOSS


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_s_gradient_is_its_finite_difference(tiny: Any, kind: str) -> None:
    objective = _family(tiny, kind)
    at = np.log([*LONG, 1.1])
    gradient = objective.measure(Trial(_at(at, 0), "search", 0, gradient=True)).gradient
    assert gradient is not None
    index = int(np.argmax(np.abs(gradient[3:16]))) + 3
    assert gradient[index] == pytest.approx(_slope(objective, at, index), rel=0.05)
    assert abs(gradient[index]) > 5e-4


def test_an_unknown_family_is_refused(tiny: Any) -> None:
    config = AutoConfig.for_model("gpt2", vocab_size=97, n_embd=32, n_layer=1, n_head=2)
    with pytest.raises(UnsupportedModelError, match="gpt2"):
        ModelObjective(AutoModelForCausalLM.from_config(config), tiny.numbers, {"search": tiny.rows})


def test_the_search_space_s_seed_moves_a_real_model(tiny: Any, objective: ModelObjective) -> None:
    losses = {
        objective.measure(Trial(closed_form(name, tiny.numbers), "search", 0)).loss for name in ("pi", "ntk", "yarn")
    }
    assert len(losses) == 3
