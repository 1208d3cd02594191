"""Perplexity against full logits and transformers' own loss, its weighting, and the passes that lengths share."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from longrope_export import RopeScaling, load
from longrope_export.errors import NumericalError, ScalingError, TextTooShortError, UnsupportedModelError
from longrope_export.evaluation.documents import Row
from longrope_export.evaluation.losses import body_states, check_head, head_logits
from longrope_export.evaluation.passes import fixed_set, forward_lengths, rotation_of
from longrope_export.evaluation.perplexity import default_span_edges, evaluate_perplexity, token_losses
from longrope_export.evaluation.tables import compare_methods, render_comparison
from longrope_export.report.numbers import perplexity_text
from longrope_export.rope.methods import method_scaling
from longrope_export.rotary import rotary_module

WINDOW, VOCABULARY = 32, 97
NUMBERS = {"rope_theta": 10000.0, "rotary_dim": 32, "original_max_position_embeddings": WINDOW}


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def rows(length: int, count: int) -> list[Row]:
    return [Row(f"row {seed}", ids(length, seed)[0].numpy()) for seed in range(count)]


def brute_force(model: Any, row: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(row, use_cache=False).logits[0, :-1].double()
    losses: Tensor = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none")
    return losses


def random_model(family: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.15, max_position_embeddings=WINDOW,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def longrope_record(**changes: Any) -> RopeScaling:
    values: dict[str, Any] = {
        **NUMBERS,
        "max_position_embeddings": 128,
        "long_factor": tuple(np.linspace(1, 4, 16)),
        "short_factor": tuple(np.linspace(1, 1.5, 16)),
        "long_attention_factor": 1.1,
        "short_attention_factor": 1.05,
    }
    return RopeScaling(**{**values, **changes})


@pytest.mark.parametrize("chunk", [1, 7, 49, 512])
def test_losses_equal_those_of_full_logits_for_any_chunk(model: Any, chunk: int) -> None:
    row = ids(50)
    with torch.no_grad():
        losses = token_losses(model, row, chunk=chunk)
    assert losses.shape == (49,)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), brute_force(model, row), rtol=0, atol=1e-5)


def test_the_mean_is_the_loss_that_transformers_computes(model: Any) -> None:
    row = ids(50)
    with torch.no_grad():
        assert abs(token_losses(model, row).mean() - model(row, labels=row).loss) < 1e-5


FAMILIES = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "gemma2": {"head_dim": 32, "final_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 32, "final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "phi3": {},
    "qwen2": {"tie_word_embeddings": True},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_capped_and_tied_heads(family: str) -> None:
    model = random_model(family, **FAMILIES[family])
    row = ids(20)
    with torch.no_grad():
        losses = token_losses(model, row, chunk=6)
        plain = torch.nn.functional.cross_entropy(
            model.get_output_embeddings()(body_states(model, row)[0, :-1]), row[0, 1:], reduction="none"
        )
    torch.testing.assert_close(losses.double(), brute_force(model, row), rtol=0, atol=1e-5)
    if family not in ("phi3", "qwen2"):
        assert (losses - plain).abs().max() > 0.05, "the family's rule makes no difference here: the test is empty"


def test_a_head_that_is_not_understood_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own(self, *args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM changes its logits"):
        evaluate_perplexity(model, rows(20, 1), [20])


def test_a_model_without_lm_head_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no lm_head"):
        token_losses(model.model, ids(10))


def test_bf16_losses_are_summed_in_float32(model: Any) -> None:
    model.to(torch.bfloat16)
    row = ids(50)
    with torch.no_grad():
        hidden = body_states(model, row)[0, :-1]
        expected = torch.nn.functional.cross_entropy(head_logits(model, hidden).double(), row[0, 1:], reduction="none")
        losses = token_losses(model, row)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), expected, rtol=0, atol=1e-5)


def test_lm_head_never_sees_more_than_a_chunk(model: Any) -> None:
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2]))
    with torch.no_grad():
        token_losses(model, ids(101), chunk=16)
    assert seen == [16] * 6 + [4]


def test_peak_memory_does_not_grow_with_length_times_vocabulary() -> None:
    model = random_model("llama", head_dim=32)
    model.resize_token_embeddings(8_000)
    row = ids(401)
    sizes = [tensor.numel() for tensor in created_tensors(lambda: token_losses(model, row, chunk=16))]
    assert max(sizes) <= 16 * 8_000
    full = created_tensors(lambda: model(row, use_cache=False))
    assert max(tensor.numel() for tensor in full) >= 400 * 8_000, "the measuring does not see the full logits"


def created_tensors(call: Any) -> list[Tensor]:
    from torch.utils._python_dispatch import TorchDispatchMode

    made: list[Tensor] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            if isinstance(output, Tensor) and "t.default" not in str(function):
                made.append(torch.empty_like(output, device="meta"))
            return output

    with torch.no_grad(), Record():
        call()
    return made


def test_gradients_are_those_of_the_full_loss_with_chunks_recomputed(model: Any) -> None:
    row = ids(40)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = token_losses(model, row, chunk=5).mean()
    assert VOCABULARY * 5 not in saved, "logits are kept for the backward pass"
    loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model(row, labels=row, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_positions_replace_the_position_ids(model: Any) -> None:
    row, positions = ids(20), torch.arange(20)[None] * 2
    with torch.no_grad():
        losses = token_losses(model, row, positions=positions)
        logits = model(row, position_ids=positions, use_cache=False).logits[0, :-1]
        assert (losses - token_losses(model, row)).abs().max() > 1e-3
    torch.testing.assert_close(
        losses, torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none"), rtol=0, atol=1e-5
    )


def test_perplexity_is_exp_of_all_losses_over_all_tokens(model: Any) -> None:
    data = rows(40, 3)
    result = evaluate_perplexity(model, data, [40]).at(40)
    losses = [brute_force(model, torch.from_numpy(row.token_ids)[None]) for row in data]
    expected = math.exp(sum(float(loss.sum()) for loss in losses) / (3 * 39))
    assert abs(result.perplexity / expected - 1) < 1e-5
    assert result.tokens == 3 * 39
    assert result.document_nll == pytest.approx([float(loss.mean()) for loss in losses], abs=1e-5)
    mean_of_perplexities = sum(math.exp(nll) for nll in result.document_nll) / 3
    assert abs(result.perplexity / mean_of_perplexities - 1) > 1e-3, "the wrong mean would pass here"


def test_lengths_from_one_forward_equal_separate_forwards(model: Any) -> None:
    data = rows(60, 2)
    together = evaluate_perplexity(model, data, [20, 33, 60])
    assert together.forward_passes == 2
    assert list(together.losses) == [60]
    for length in (20, 33, 60):
        alone = evaluate_perplexity(model, data, [length])
        assert together.at(length).perplexity == pytest.approx(alone.at(length).perplexity, rel=1e-5)
        assert together.at(length).tokens == alone.at(length).tokens == 2 * (length - 1)


def test_spans_cover_every_target_once_and_mean_to_the_whole(model: Any) -> None:
    result = evaluate_perplexity(model, rows(100, 2), [100])
    assert [(span.start, span.end) for span in result.spans] == [(a, min(a + 8, 100)) for a in range(0, 100, 8)]
    assert sum(span.tokens for span in result.spans) == result.at(100).tokens == 2 * 99
    nll = sum(math.log(span.perplexity) * span.tokens for span in result.spans) / (2 * 99)
    assert nll == pytest.approx(result.at(100).nll)


def test_a_span_holds_the_losses_of_its_own_target_tokens(model: Any) -> None:
    data = rows(60, 2)
    result = evaluate_perplexity(model, data, [60], span_edges=[0, 10, 60])
    losses = torch.stack([brute_force(model, torch.from_numpy(row.token_ids)[None]) for row in data])
    assert result.spans[0].tokens == 2 * 9
    assert math.log(result.spans[0].perplexity) == pytest.approx(float(losses[:, :9].mean()), abs=1e-5)
    assert math.log(result.spans[1].perplexity) == pytest.approx(float(losses[:, 9:].mean()), abs=1e-5)


@pytest.mark.parametrize(
    ("longest", "window", "step"),
    [(16384, 8192, 2048), (32768, 8192, 4096), (2048, 256, 256), (256, 256, 32), (131072, 8192, 16384), (7, 0, 1)],
)
def test_default_spans_are_the_window_doubled_or_halved(longest: int, window: int, step: int) -> None:
    edges = default_span_edges(longest, window)
    assert edges[:2] == [0, step]
    assert edges[-1] == longest


def test_a_switching_model_is_measured_on_each_side_with_the_set_of_that_side(tiny_llama: Path) -> None:
    record = longrope_record()
    data, lengths = rows(60, 2), [20, WINDOW, WINDOW + 1, 60]
    switching = evaluate_perplexity(load(tiny_llama, record), data, lengths)
    assert switching.forward_passes == 4
    assert sorted(switching.losses) == [WINDOW, 60]
    sides = {
        side: evaluate_perplexity(load(tiny_llama, record, switch=side), data, lengths) for side in ("short", "long")
    }
    for length in lengths:
        own, other = ("short", "long") if length <= WINDOW else ("long", "short")
        assert switching.at(length).perplexity == pytest.approx(sides[own].at(length).perplexity, rel=1e-5)
        assert abs(switching.at(length).perplexity / sides[other].at(length).perplexity - 1) > 1e-4
    assert sides["short"].forward_passes == 2


def test_each_of_the_further_short_sets_has_its_own_pass(tiny_llama: Path) -> None:
    record = longrope_record(sets={16: tuple(np.linspace(1, 1.2, 16))})
    result = evaluate_perplexity(load(tiny_llama, record), rows(60, 1), [10, 16, 20, 32, 33, 60])
    assert sorted(result.losses) == [16, 32, 60]


STOCK = {
    "longrope": (
        {
            "long_factor": [4.0] * 16,
            "short_factor": [1.0] * 16,
            "factor": 4.0,
            "original_max_position_embeddings": WINDOW,
        },
        [WINDOW, 80],
    ),
    "dynamic": ({"factor": 2.0}, [WINDOW, 50, 80]),
}


@pytest.mark.parametrize("rope_type", STOCK)
def test_transformers_own_length_dependent_types_are_not_shared_across_lengths(
    tiny_llama: Path, rope_type: str
) -> None:
    parameters, passes = STOCK[rope_type]

    def stock() -> Any:
        config = AutoConfig.from_pretrained(tiny_llama)
        config.rope_parameters = {"rope_theta": 10000.0, "rope_type": rope_type, **parameters}
        return AutoModelForCausalLM.from_pretrained(tiny_llama, config=config).eval()

    model, data, lengths = stock(), rows(80, 2), [20, WINDOW, 50, 80]
    # Twice: dynamic NTK keeps the frequencies of the longest call so far.
    for _ in range(2):
        result = evaluate_perplexity(model, data, lengths)
        assert sorted(result.losses) == passes
        for length in lengths:
            alone = brute_force(stock(), torch.from_numpy(data[0].token_ids)[None, :length])
            assert result.at(length).document_nll[0] == pytest.approx(float(alone.mean()), abs=1e-5)


def test_forward_lengths_takes_the_longest_of_each_rotation() -> None:
    assert forward_lengths([8, 2, 5, 9], lambda length: length > 5) == {8: 9, 2: 5, 5: 5, 9: 9}


def test_nan_is_named_with_its_document_and_token(model: Any) -> None:
    check_head(model)
    calls: list[int] = []

    def spoil(module: Any, args: Any, output: Tensor) -> None:
        calls.append(1)
        if len(calls) == 2:
            output[0, 6] = float("nan")

    model.model.norm.register_forward_hook(spoil)
    with pytest.raises(NumericalError, match="row 1: the model gives a NaN or infinite loss at token 8;"):
        evaluate_perplexity(model, rows(20, 3), [20])


def test_rows_that_do_not_fit_are_refused_before_running(model: Any) -> None:
    with pytest.raises(TextTooShortError, match="row 0 has 20 tokens; 21"):
        evaluate_perplexity(model, rows(20, 1), [21])
    with pytest.raises(TextTooShortError, match="no text"):
        evaluate_perplexity(model, [], [20])
    with pytest.raises(TextTooShortError, match="at least 2"):
        evaluate_perplexity(model, rows(20, 1), [1])
    with pytest.raises(UnsupportedModelError, match="id 97 and the model knows 97 tokens"):
        evaluate_perplexity(model, [[1, 97, 5]], [3])


def test_progress_counts_up_to_everything(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    evaluate_perplexity(model, rows(20, 3), [10, 20], progress=lambda done, everything: seen.append((done, everything)))
    assert seen == [(20, 60), (40, 60), (60, 60)]


def records() -> dict[str, RopeScaling | None]:
    closed = {name: method_scaling(name, **NUMBERS, max_position_embeddings=128) for name in ("pi", "ntk")}
    return {"unchanged": None, **closed, "searched": longrope_record()}


def test_the_comparison_equals_one_loaded_model_per_record(tiny_llama: Path, model: Any) -> None:
    data, lengths = rows(128, 2), [WINDOW, 64, 128]
    before = rotary_module(model)
    table = compare_methods(model, data, lengths, records())
    assert rotary_module(model) is before
    for name, record in records().items():
        alone = load(tiny_llama, record, switch="long") if record else load(tiny_llama)
        expected = evaluate_perplexity(alone, data, lengths)
        for length in lengths:
            assert table.perplexity(name, length) == pytest.approx(expected.at(length).perplexity, rel=1e-5)
    short = evaluate_perplexity(load(tiny_llama, longrope_record(), switch="short"), data, [WINDOW])
    assert table.short_perplexity("searched") == pytest.approx(short.at(WINDOW).perplexity, rel=1e-5)
    assert table.short_perplexity("searched") != pytest.approx(table.perplexity("searched", WINDOW), rel=1e-4)
    assert table.short_perplexity("pi") == table.perplexity("pi", WINDOW)
    assert len({round(table.perplexity(name, 128), 3) for name in records()}) == 4


def test_the_comparison_runs_one_forward_per_document_and_static_method(model: Any) -> None:
    calls: list[int] = []
    model.model.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    check_head(model)
    calls.clear()
    compare_methods(model, rows(128, 2), [64, 128], records())
    assert calls == [128] * 8 + [WINDOW] * 2


def test_a_record_for_another_model_is_refused_before_anything_is_run(model: Any) -> None:
    other = longrope_record(rotary_dim=16, long_factor=(1.0,) * 8, short_factor=())
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(1))
    with pytest.raises(ScalingError, match="rotary_dim 16"):
        compare_methods(model, rows(64, 1), [64], {"unchanged": None, "other": other})
    assert not calls


def test_a_fixed_set_holds_at_every_length_and_is_taken_back(tiny_llama: Path, model: Any) -> None:
    record = longrope_record(long_start_tokens=5)
    row, plain = ids(20), brute_force(model, ids(20))
    for side in ("short", "long"):
        with fixed_set(model, record, side):  # type: ignore[arg-type]
            inside = brute_force(model, row)
            assert rotation_of(model)(1) == rotation_of(model)(10_000)
        expected = brute_force(load(tiny_llama, record, switch=side), row)  # type: ignore[arg-type]
        torch.testing.assert_close(inside, expected, rtol=0, atol=1e-6)
        assert (inside - plain).abs().max() > 1e-3
    torch.testing.assert_close(brute_force(model, row), plain, rtol=0, atol=0)


def test_the_table_shows_every_number_and_marks_the_best(model: Any) -> None:
    from rich.console import Console

    table = compare_methods(model, rows(128, 2), [64, 128], records(), window=WINDOW)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render_comparison(table))
    text = console.export_text(styles=True, clear=False)
    for name in records():
        for length in (64, 128):
            assert perplexity_text(table.perplexity(name, length)) in text
        assert perplexity_text(table.short_perplexity(name)) in text
    best = re.escape(perplexity_text(table.perplexity(table.best(128), 128)))
    assert re.search(rf"\x1b\[1m *{best}", text)
    assert "4× (128)" in text
    assert table.best(128) == min(records(), key=lambda name: table.perplexity(name, 128))


def test_the_table_as_json_names_documents_and_hash(model: Any) -> None:
    import json

    values = json.loads(json.dumps(compare_methods(model, rows(64, 2), [64], records()).to_dict(), allow_nan=False))
    assert values["documents"] == ["row 0", "row 1"]
    assert len(values["data_sha256"]) == 64
    assert [row["name"] for row in values["rows"]] == list(records())
    assert values["rows"][0]["perplexity"]["64"] > 1
    assert values["rows"][1]["provenance"]["method"] == "pi"
